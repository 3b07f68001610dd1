"""One torchrun process of the tests: trains tiny Megatron-Core GPT models, a scenario at a time.

torchrun --nproc-per-node N -m tests.megatron.worker SCENARIOS_AS_JSON RESULT_FILE
"""

import contextlib
import dataclasses
import itertools
import json
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mhc import MHCConfig
from megatron_mhc.patches import cpu

cpu.enter()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import (  # noqa: E402
    ShardedTensor,
    apply_factories,
)
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.inference.contexts import StaticInferenceContext  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt import gpt_layer_specs as specs  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import (  # noqa: E402
    get_forward_backward_func,
    schedules,
)
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import MLATransformerConfig, TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper  # noqa: E402

from megatron_mhc import with_mhc  # noqa: E402
from megatron_mhc.aside import Aside  # noqa: E402
from megatron_mhc.connection import HyperConnection  # noqa: E402
from megatron_mhc.parameters import is_hyper_connection  # noqa: E402
from megatron_mhc.recompute import rebuild_ahead  # noqa: E402
from tests.megatron.rendezvous import hosts_wait  # noqa: E402

VOCABULARY, SEQUENCE = 128, 32


@dataclasses.dataclass
class Scenario:
    """A model, how it is distributed and how long it trains.

    Attributes:
        mhc: settings of MHCConfig, or None for the ordinary model.
        mhc_by_rank: these instead, one for each rank.
        config: settings of TransformerConfig beyond the tiny defaults.
        share_config: build a model with mHC first, with the same TransformerConfig.
        parallel: keyword arguments of initialize_model_parallel.
        tied: whether the output layer's weight is the embedding's.
        evaluate: after training, run the microbatches of one more step forward only.
        ddp, optimizer: settings of the distributed wrapper and the optimizer.
        kind: the spec: "dense", "moe", "mla", "mla moe", "block" (a dense
            TransformerBlockSubmodules) or "own norm" (`OwnNorm` in both norm slots).
        perturb: give mHC's parameters values of a trained model's size instead of their start.
        save, load: folders of a distributed checkpoint of the model.
        bf16: train in bf16.
        fuse: which boundaries between sites run in one operation: "all", "layer" (none across
            layers) or "none".
        interrupt: throw an exception in the middle of a forward before training, and catch it:
            True or "forward", or "backward" for the middle of a backward.
        evaluate_between: run the microbatches of a step forward only, after every step.
        hold: count the bytes that a forward keeps for its backward (`held_bytes`).
        rebuild_ahead: rebuild the chunk's last block between every forward and its backward.
        decode: after training, read some tokens at once and token by token (`decoded`).
        hosts_wait: every message between stages ends before its post returns (`rendezvous`).
        unmarked: take `sequence_parallel` off mHC's parameters: under it their gradients are wrong.
    """

    steps: int = 3
    mhc: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    mhc_by_rank: list[dict[str, Any]] | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    share_config: bool = False
    parallel: dict[str, Any] = dataclasses.field(default_factory=dict)
    ddp: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    kind: str = "dense"
    perturb: bool = True
    microbatches: int = 2
    batch: int = 4
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
    hosts_wait: bool = False
    unmarked: bool = False


def transformer_config(s: Scenario) -> TransformerConfig:
    """The tiny model's TransformerConfig."""
    settings: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
        # the same weights whatever the tensor parallel size
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": s.parallel.get("tensor_model_parallel_size", 1),
        "expert_model_parallel_size": s.parallel.get("expert_model_parallel_size", 1),
        "pipeline_model_parallel_size": s.parallel.get("pipeline_model_parallel_size", 1),
        "virtual_pipeline_model_parallel_size": s.parallel.get(
            "virtual_pipeline_model_parallel_size"
        ),
        # Megatron's own defaults for the interleaved schedule
        "overlap_p2p_comm": "virtual_pipeline_model_parallel_size" in s.parallel,
        "batch_p2p_comm": "virtual_pipeline_model_parallel_size" not in s.parallel,
        "deallocate_pipeline_outputs": True,
        "bf16": s.bf16,
        "params_dtype": torch.bfloat16 if s.bf16 else torch.float32,
        "pipeline_dtype": torch.bfloat16 if s.bf16 else torch.float32,
    }
    if "moe" in s.kind:
        settings |= {
            "num_moe_experts": 4,
            "moe_router_topk": 2,
            "moe_token_dispatcher_type": "alltoall",
            "moe_ffn_hidden_size": 96,
            "add_bias_linear": False,
        }
    if "mla" in s.kind:
        settings |= {
            "multi_latent_attention": True,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_head_dim": 16,
            "qk_pos_emb_head_dim": 8,
            "v_head_dim": 16,
            "rope_type": "rope",
            "add_bias_linear": False,
        }
        return MLATransformerConfig(**(settings | s.config))
    return TransformerConfig(**(settings | s.config))


class OwnNorm(torch.nn.Module):
    """A norm that Megatron has never heard of, built as it builds its own (and Apex's)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """x over its largest element's size."""
        return self.weight * x / (x.abs().amax(-1, keepdim=True) + self.eps)


def layer_spec(s: Scenario, config: TransformerConfig, chunk: int | None) -> Any:
    """The spec that Megatron's own function returns for this kind of model."""
    if s.kind in ("moe", "mla moe", "block"):
        return specs.get_gpt_decoder_block_spec(config, False, vp_stage=chunk)
    if s.kind == "mla":
        return specs.get_gpt_layer_local_spec(multi_latent_attention=True)
    spec = specs.get_gpt_layer_local_spec(normalization=config.normalization)
    if s.kind == "own norm":
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = OwnNorm
    return spec


PERTURBATION = {"phi": 0.05, "theta": 0.05, "alpha": 0.3, "bias": 0.5}
"""How far training takes mHC's parameters from their start."""


@torch.no_grad()
def seed_weights(model: GPTModel, perturb: bool) -> None:
    """Give every weight the values that its global name stands for, however it is split.

    Matrices of Megatron's are drawn anew; mHC's parameters are moved from their start if asked to.
    """
    for leaf in whole_model_shards(model):
        _, _, owner, name = f"..{leaf.key}".rsplit(".", 3)
        ours = "connection" in owner or owner == "head"
        if (ours and not perturb) or (not ours and len(leaf.global_shape) < 2):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(leaf.key.encode()))
        whole = torch.randn(leaf.global_shape, generator=generator)
        shape = (1,) * (len(leaf.global_shape) - leaf.data.dim()) + tuple(leaf.data.shape)
        part = whole[
            tuple(slice(o, o + e) for o, e in zip(leaf.global_offset, shape, strict=True))
        ].reshape(leaf.data.shape)
        if ours:
            leaf.data.add_(PERTURBATION.get(name, 0.05) * part)
        else:
            leaf.data.copy_(0.1 * part)


def whole_model_shards(model: GPTModel) -> list[ShardedTensor]:
    """This rank's parameters as shards of the whole model's, by checkpoint key."""
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    apply_factories(state)
    return list(_leaves(state))


def build(s: Scenario, config: TransformerConfig) -> list[GPTModel]:
    """This rank's model chunks, with the same initial weights in every scenario of their kind."""
    virtual = config.virtual_pipeline_model_parallel_size
    return [build_chunk(s, config, chunk if virtual else None) for chunk in range(virtual or 1)]


def build_chunk(s: Scenario, config: TransformerConfig, chunk: int | None) -> GPTModel:
    """One chunk of the model. Its weights are those of the whole model, built alike everywhere."""
    model_parallel_cuda_manual_seed(7)
    spec = layer_spec(s, config, chunk)
    mtp = None
    if config.mtp_num_layers:
        mtp = specs.get_gpt_mtp_block_spec(config, spec, False, vp_stage=chunk)
    if s.mhc is not None:
        spec = with_mhc(spec, MHCConfig(**s.mhc))
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=s.tied,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        vp_stage=chunk,
        mtp_block_spec=mtp,
    )
    seed_weights(model, s.perturb)
    for parameter in model.parameters():
        if s.unmarked and is_hyper_connection(parameter):
            parameter.sequence_parallel = False
    for layer in model.decoder.layers if s.mhc is not None else ():
        if s.fuse != "all":
            layer.mlp_site.following = None
        if s.fuse == "none":
            layer.attention_site.following = None
    return model


def interrupted(s: Scenario, model: GPTModel) -> None:
    """A step that an exception ends at the second layer's MLP: of its forward or its backward."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    mlp = model.decoder.layers[1].mlp
    if s.interrupt == "backward":
        hook = mlp.register_forward_hook(lambda *a: a[-1][0].register_hook(interrupt) and None)
    else:
        hook = mlp.register_forward_pre_hook(interrupt)
    try:
        output, loss = forward_step(batches(s, 99), model)
        loss(output)[0].backward()
    except KeyboardInterrupt:
        hook.remove()
    else:
        raise AssertionError(f"the {s.interrupt} was not interrupted")


def held_bytes(s: Scenario, model: GPTModel) -> dict[str, int]:
    """What one microbatch's forward keeps for its backward, in bytes of distinct storages.

    kept: as the forward leaves it; ahead: when `rebuild_ahead` has done its work; whole: when the
    backward has rebuilt all (these storages are held here, so nothing is freed); evaluation: what
    a forward without gradients keeps.
    """
    storages: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    def total() -> int:
        return sum(storage.nbytes() for storage in storages.values())

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output, loss = forward_step(batches(s, 99), model)
    result = {"kept": total()}
    while rebuild_ahead(model):
        pass
    result["ahead"] = total()
    loss(output)[0].backward()
    result["whole"] = total()
    storages.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward_step(batches(s, 99), model)
    return {**result, "evaluation": total()}


def batches(s: Scenario, step: int) -> Iterator[Tensor]:
    """This data-parallel rank's microbatches of tokens [b, SEQUENCE + 1]."""
    # two batches in turn: few enough to be learnt by heart
    generator = torch.Generator().manual_seed(1000 + step % 2)
    tokens = torch.randint(0, VOCABULARY, (s.batch, SEQUENCE + 1), generator=generator)
    ranks = parallel_state.get_data_parallel_world_size()
    for microbatch in tokens.chunk(s.microbatches):
        yield microbatch.chunk(ranks)[parallel_state.get_data_parallel_rank()]


def forward_step(iterator: Iterator[Tensor], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Megatron's forward_step: the loss of a microbatch of tokens, averaged over them."""
    tokens = next(iterator)
    positions = torch.arange(SEQUENCE).expand(tokens.shape[0], -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    losses = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])

    def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean = output.float().mean()
        # a copy: the schedule divides the loss by the number of microbatches in place
        return mean, {"loss": mean.detach().clone()}

    return losses, loss


@torch.no_grad()
def decoded(model: GPTModel) -> dict[str, Tensor]:
    """Logits [b, t, VOCABULARY] of the last five of twelve tokens.

    whole: all tokens in one forward; cached: eight, then one at a time, past keys and values kept.
    """
    model.eval()
    tokens = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(12).expand(2, -1)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).triu(1)
    whole = model(tokens, positions, mask)
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=12)
    options = {"inference_context": context, "runtime_gather_output": True}
    parts = [model(tokens[:, :8], positions[:, :8], mask[..., :8, :8], **options)]
    context.enable_decode_mode()
    for at in range(8, 12):
        context.sequence_len_offset = at
        one = slice(at, at + 1)
        parts.append(model(tokens[:, one], positions[:, one], None, **options))
    return {"whole": whole[:, -5:], "cached": torch.cat(parts, 1)[:, -5:]}


def full_parameters(chunks: list[GPTModel]) -> dict[str, Tensor]:
    """Every parameter of the whole model by its checkpoint key, put together from all ranks."""
    shards = [
        (leaf.key, tuple(leaf.global_shape), leaf.global_offset, leaf.data.detach().clone())
        for chunk in chunks
        for leaf in whole_model_shards(chunk)
    ]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, shards)
    full: dict[str, Tensor] = {}
    for key, shape, offset, data in (shard for rank in gathered for shard in rank):
        # a shard of a stack (of experts, say) lacks the axes that it is stacked along
        data = data.view((1,) * (len(shape) - data.dim()) + data.shape)
        whole = full.setdefault(key, torch.full(shape, torch.nan, dtype=data.dtype))
        whole[tuple(slice(o, o + e) for o, e in zip(offset, data.shape, strict=True))] = data
    return full


def mean_loss(reduced: list[dict[str, Tensor]]) -> float:
    """A step's loss, from the last stages of all data-parallel ranks."""
    mine = [entry["loss"].item() for entry in reduced]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    losses = torch.tensor([loss for rank in gathered for loss in rank])
    return losses.mean().item()


def mtp_loss() -> list[float]:
    """The losses of multi-token prediction since the last call, a depth each, as logged."""
    tracker = MTPLossLoggingHelper.tracker
    mine = tracker["loss_values"].tolist() if "loss_values" in tracker else None
    MTPLossLoggingHelper.tracker = {}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    ranks = [values for values in gathered if values is not None]
    return [sum(depth) / len(ranks) for depth in zip(*ranks, strict=True)]


def _leaves(state: Any) -> Iterator[ShardedTensor]:
    values = state.values() if isinstance(state, dict) else state
    for value in values:
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, dict | list):
            yield from _leaves(value)


@contextlib.contextmanager
def counted(owner: type, *names: str) -> Iterator[dict[str, int]]:
    """How often methods of a class are called, by name."""
    counts = dict.fromkeys(names, 0)

    def counting(name: str, method: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return method(*args, **kwargs)

        return count

    with contextlib.ExitStack() as stack:
        for name in names:
            method = getattr(owner, name)
            setattr(owner, name, counting(name, method))
            stack.callback(setattr, owner, name, method)
        yield counts


@contextlib.contextmanager
def most_in_flight() -> Iterator[list[int]]:
    """The most microbatches (of a chunk) between their forward and their backward, by rank."""
    held, most = 0, 0
    forward, backward = schedules.forward_step, schedules.backward_step

    def count_forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal held, most
        held += torch.is_grad_enabled()
        most = max(most, held)
        return forward(*args, **kwargs)

    def count_backward(*args: Any, **kwargs: Any) -> Any:
        nonlocal held
        held -= 1
        return backward(*args, **kwargs)

    schedules.forward_step, schedules.backward_step = count_forward, count_backward
    found: list[int] = []
    try:
        yield found
    finally:
        schedules.forward_step, schedules.backward_step = forward, backward
    found += [0] * dist.get_world_size()
    dist.all_gather_object(found, most)


MESSAGES = [
    *("recv_forward", "send_forward", "recv_backward", "send_backward"),
    *("send_forward_recv_backward", "send_backward_recv_forward"),
    *("send_forward_recv_forward", "send_backward_recv_backward"),
]


def run(s: Scenario) -> dict[str, Any]:
    """Build, train and describe a scenario.

    Returns:
        losses (one a step), mtp_losses (a list a step: of all its microbatches, by depth),
        parameters (whole, after training), gradients (of mHC's on this rank, a dict a step),
        dtypes and weight_decay (of each parameter, by name), and
        linked (for each layer but the last, whether its last site knows the next layer's first),
        calls (how often each connection ran for a microbatch, on average),
        messages (calls of each method of P2PCommunicator) and aside (of each method of Aside),
        in_flight (`most_in_flight`).
    """
    waits = hosts_wait() if s.hosts_wait else contextlib.nullcontext()
    with (
        waits,
        counted(P2PCommunicator, *MESSAGES) as messages,
        counted(Aside, "run", "open") as aside,
        most_in_flight() as in_flight,
    ):
        result = train(s)
    return result | {"messages": messages, "aside": aside, "in_flight": in_flight}


def train(s: Scenario) -> dict[str, Any]:
    """`run`, but for what is counted there."""
    parallel_state.initialize_model_parallel(**s.parallel)
    if s.mhc_by_rank is not None:
        s.mhc = s.mhc_by_rank[dist.get_rank()]
    config = transformer_config(s)
    config.finalize_model_grads_func = finalize_model_grads
    if s.share_config:
        build(dataclasses.replace(s, mhc={}), config)
    cores = build(s, config)
    model = [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(**s.ddp),
            Float16Module(config, core) if s.bf16 else core,
            disable_bucketing=index > 0,
        )
        for index, core in enumerate(cores)
    ]
    no_sync = [chunk.no_sync for chunk in model]
    config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            **{
                "optimizer": "adam",
                "lr": 1e-3,
                "min_lr": 1e-3,
                "weight_decay": 0.1,
                "clip_grad": 1.0,
                "bf16": s.bf16,
                "params_dtype": config.params_dtype,
                "use_distributed_optimizer": s.ddp.get("use_distributed_optimizer", False),
                "overlap_param_gather": s.ddp.get("overlap_param_gather", False),
            }
            | s.optimizer
        ),
        model,
    )
    config.grad_scale_func = optimizer.scale_loss
    if s.load is not None:
        (core,) = cores
        state = dist_checkpointing.load({"model": core.sharded_state_dict()}, s.load)
        core.load_state_dict(state["model"])
        optimizer.reload_model_params()
    if s.ddp.get("overlap_param_gather"):
        config.param_sync_func = model[0].start_param_sync
    if s.interrupt:
        interrupted(s, cores[0])
    held = held_bytes(s, cores[0]) if s.hold else None
    ranks = parallel_state.get_data_parallel_world_size()

    def step_func(iterator: Iterator[Tensor], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        result = forward_step(iterator, chunk)
        if s.rebuild_ahead:
            rebuild_ahead(chunk)
        return result

    def run_step(step: int, forward_only: bool = False) -> float:
        iterators = [batches(s, step) for _ in model]
        reduced = get_forward_backward_func()(
            forward_step_func=step_func,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=model,
            num_microbatches=s.microbatches,
            seq_length=SEQUENCE,
            micro_batch_size=s.batch // s.microbatches // ranks,
            forward_only=forward_only,
        )
        return mean_loss(reduced)

    calls: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda *_: calls.update({name: calls.get(name, 0) + 1})

    for name, module in cores[0].named_modules():
        if isinstance(module, HyperConnection):
            module.register_forward_hook(count(name))
    losses, gradients, mtp_losses = [], [], []
    for step in range(s.first_step, s.first_step + s.steps):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses.append(run_step(step))
        mtp_losses.append(mtp_loss())
        gradients.append(
            {
                name: parameter.main_grad.detach().clone()
                for core in cores
                for name, parameter in core.named_parameters()
                if is_hyper_connection(parameter)
            }
        )
        optimizer.step()
        if s.evaluate_between:
            with torch.no_grad():
                losses.append(run_step(step, forward_only=True))
    if s.ddp.get("overlap_param_gather"):
        model[0].disable_forward_pre_hook(param_sync=True)
    if s.evaluate:
        with torch.no_grad():
            losses.append(run_step(s.first_step + s.steps, forward_only=True))
    if s.save is not None:
        dist_checkpointing.save({"model": cores[0].sharded_state_dict()}, s.save)
    core = cores[0]
    names = {parameter: name for name, parameter in core.named_parameters()}
    result = {
        "losses": losses,
        "gradients": gradients,
        "mtp_losses": mtp_losses,
        "parameters": full_parameters(cores),
        "held": held,
        "dtypes": {name: str(p.dtype) for name, p in core.named_parameters()},
        "calls": {name: calls[name] / (s.steps * s.microbatches) for name in calls},
        "linked": [
            layer.mlp_site.following is after.attention_site
            for layer, after in itertools.pairwise(core.decoder.layers)
            if s.mhc is not None
        ],
        "weight_decay": {
            names[parameter]: group["wd_mult"]
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter in names
        },
        "decoded": decoded(cores[0]) if s.decode else None,
    }
    parallel_state.destroy_model_parallel()
    return result


def main() -> None:
    """Run every scenario of the command line; rank 0 writes what they returned."""
    scenarios, result_file = sys.argv[1:]
    dist.init_process_group("gloo")
    results = {name: run(Scenario(**s)) for name, s in json.loads(scenarios).items()}
    if dist.get_rank() == 0:
        torch.save(results, result_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
