"""What a scenario of the tests may set."""

import dataclasses
from typing import Any

VOCABULARY, SEQUENCE = 128, 32


@dataclasses.dataclass
class Scenario:
    """A model, how it is distributed and how long it trains.

    Attributes:
        mhc: settings of MHCConfig, or None for the ordinary model.
        sinkhorn_iterations: where mhc does not say; few, as most comparisons hold for any number.
        mhc_by_rank, hidden_by_rank: these instead, one for each rank; hidden sizes too.
        message_by_rank: arguments that each rank calls its schedule with, beside its own.
        evaluation_by_rank: the same, for evaluation alone.
        config: settings of TransformerConfig beyond the tiny defaults.
        share_config: build a model with mHC first, with the same TransformerConfig.
        parallel: keyword arguments of initialize_model_parallel.
        tied: whether the output layer's weight is the embedding's.
        evaluate: after training, run the microbatches of one more step forward only.
        ddp, optimizer: settings of the distributed wrapper and the optimizer.
        fsdp: Megatron-FSDP's sharding strategy, in the place of the distributed wrapper.
        align_grad_reduce: gradients of each stage are reduced when the schedule says so.
        kind: the spec: "dense", "moe", "mla", "mla moe", "block" (a dense
            TransformerBlockSubmodules) or "own norm" (`OwnNorm` in both norm slots).
        pattern: the layers of a HybridModel, in the place of the GPT; of pairs of attention and
            an MLP alone, it has the keys and the weights of the GPT that has these layers.
        perturb: give mHC's parameters values of a trained model's size instead of their start.
        save, load: folders of a distributed checkpoint of the model.
        lengths: tokens of each microbatch's sequences, SEQUENCE at most and where it is empty.
        bf16: train in bf16.
        fuse: which boundaries between sites run in one operation: "all", "layer" (none across
            layers) or "none".
        interrupt: throw an exception in the middle of a forward before training, and catch it:
            True or "forward", or "backward" for the middle of a backward.
        evaluate_between: run the microbatches of a step forward only, after every step.
        hold: count the bytes that a forward keeps for its backward (`worker.held_bytes`).
        rebuild_ahead: rebuild the chunk's last block between every forward and its backward.
        decode: after training, read some tokens at once and token by token (`worker.decoded`).
        generate: after training, let Megatron's static engine write on (`worker.generated`).
        checkpoint: run the first and the third layer under a checkpoint that the configuration
            does not know of: "reentrant" or "non-reentrant" (PyTorch's), or "full" (Megatron's,
            all layers, turned on after the build).
        hosts_wait: every message between stages ends before its post returns (`rendezvous`).
        silent: rank 1 keeps the others waiting: its "link", or the "rank" as a whole.
        drop: layers (from 0, of the whole model) that are taken out once the model is built.
        unmarked: take `sequence_parallel` off mHC's parameters: under it their gradients are wrong.
    """

    steps: int = 2
    mhc: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    sinkhorn_iterations: int = 4
    mhc_by_rank: list[dict[str, Any]] | None = None
    hidden_by_rank: list[int] | None = None
    message_by_rank: list[dict[str, int]] | None = None
    evaluation_by_rank: list[dict[str, int]] | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    share_config: bool = False
    parallel: dict[str, Any] = dataclasses.field(default_factory=dict)
    ddp: dict[str, Any] = dataclasses.field(default_factory=dict)
    fsdp: str | None = None
    align_grad_reduce: bool = False
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    kind: str = "dense"
    pattern: str | None = None
    perturb: bool = True
    microbatches: int = 2
    batch: int = 4
    lengths: list[int] = dataclasses.field(default_factory=list)
    tied: bool = True
    evaluate: bool = False
    save: str | None = None
    load: str | None = None
    first_step: int = 0
    bf16: bool = False
    fuse: str = "all"
    interrupt: bool | str = False
    evaluate_between: bool = False
    hold: bool = False
    rebuild_ahead: bool = False
    decode: bool = False
    generate: bool = False
    checkpoint: str | None = None
    hosts_wait: bool = False
    silent: str | None = None
    drop: list[int] = dataclasses.field(default_factory=list)
    unmarked: bool = False
