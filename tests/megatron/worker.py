"""One torchrun process of the tests: trains tiny Megatron-Core GPT models, a scenario at a time.

torchrun --nproc-per-node N -m tests.megatron.worker SCENARIOS_AS_JSON RESULT_FILE
"""

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
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt import gpt_layer_specs as specs  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import MLATransformerConfig, TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

from megatron_mhc import with_mhc  # noqa: E402
from megatron_mhc.parameters import is_hyper_connection  # noqa: E402

VOCABULARY, SEQUENCE, BATCH = 128, 32, 4


@dataclasses.dataclass
class Scenario:
    """A model, how it is distributed and how long it trains.

    Attributes:
        mhc: settings of MHCConfig, or None for the ordinary model.
        config: settings of TransformerConfig beyond the tiny defaults.
        parallel: keyword arguments of initialize_model_parallel.
        ddp, optimizer: settings of the distributed wrapper and the optimizer.
        kind: the spec: "dense", "moe", "mla" or "block" (a dense TransformerBlockSubmodules).
        perturb: give mHC's parameters values of a trained model's size instead of their start.
        save, load: folders of a distributed checkpoint of the model.
        bf16: train in bf16.
        fuse: which boundaries between sites run in one operation: "all", "layer" (none across
            layers) or "none".
        interrupt: throw an exception in the middle of a forward before training, and catch it.
    """

    steps: int = 3
    mhc: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    parallel: dict[str, Any] = dataclasses.field(default_factory=dict)
    ddp: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    kind: str = "dense"
    perturb: bool = True
    microbatches: int = 2
    save: str | None = None
    load: str | None = None
    first_step: int = 0
    bf16: bool = False
    fuse: str = "all"
    interrupt: bool = False


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
        "bf16": s.bf16,
        "params_dtype": torch.bfloat16 if s.bf16 else torch.float32,
        "pipeline_dtype": torch.bfloat16 if s.bf16 else torch.float32,
    }
    if s.kind == "moe":
        settings |= {
            "num_moe_experts": 4,
            "moe_router_topk": 2,
            "moe_token_dispatcher_type": "alltoall",
            "moe_ffn_hidden_size": 96,
            "add_bias_linear": False,
        }
    if s.kind == "mla":
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


def layer_spec(s: Scenario, config: TransformerConfig) -> Any:
    """The spec that Megatron's own function returns for this kind of model."""
    if s.kind in ("moe", "block"):
        return specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    if s.kind == "mla":
        return specs.get_gpt_layer_local_spec(multi_latent_attention=True)
    return specs.get_gpt_layer_local_spec(normalization=config.normalization)


def perturb(model: torch.nn.Module) -> None:
    """mHC's parameters as far from their start as training takes them, the same on every rank."""
    for name, parameter in model.named_parameters():
        if is_hyper_connection(parameter):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            scale = {"phi": 0.05, "theta": 0.05, "alpha": 0.3}.get(name.split(".")[-1], 0.5)
            parameter.data += scale * noise


def build(s: Scenario, config: TransformerConfig) -> GPTModel:
    """The model of a scenario, with the same initial weights in every scenario of its kind."""
    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7)
    spec = layer_spec(s, config)
    if s.mhc is not None:
        spec = with_mhc(spec, MHCConfig(**s.mhc))
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    if s.perturb:
        perturb(model)
    for layer in model.decoder.layers if s.mhc is not None else ():
        if s.fuse != "all":
            layer.mlp_site.following = None
        if s.fuse == "none":
            layer.attention_site.following = None
    return model


def interrupted_forward(s: Scenario, model: GPTModel) -> None:
    """A forward that an exception ends in the second layer's MLP, behind a site's own work."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.decoder.layers[1].mlp.register_forward_pre_hook(interrupt)
    try:
        forward_step(batches(s, 99), model)
    except KeyboardInterrupt:
        hook.remove()
    else:
        raise AssertionError("the forward was not interrupted")


def batches(s: Scenario, step: int) -> Iterator[Tensor]:
    """This data-parallel rank's microbatches of tokens [b, SEQUENCE + 1]."""
    # two batches in turn: few enough to be learnt by heart
    generator = torch.Generator().manual_seed(1000 + step % 2)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
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


def full_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter of the whole model by its checkpoint key, put together from all ranks."""
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    apply_factories(state)
    shards = [
        (leaf.key, tuple(leaf.global_shape), leaf.global_offset, leaf.data.detach().clone())
        for leaf in _leaves(state)
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


def _leaves(state: Any) -> Iterator[ShardedTensor]:
    values = state.values() if isinstance(state, dict) else state
    for value in values:
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, dict | list):
            yield from _leaves(value)


def run(s: Scenario) -> dict[str, Any]:
    """Build, train and describe a scenario.

    Returns:
        losses (one a step), parameters (whole, after training), gradients (of the parameters of
        mHC on this rank, a dict a step), dtypes and weight_decay (of each parameter, by name), and
        linked (for each layer but the last, whether its last site knows the next layer's first).
    """
    parallel_state.initialize_model_parallel(**s.parallel)
    config = transformer_config(s)
    config.finalize_model_grads_func = finalize_model_grads
    core = build(s, config)
    module = Float16Module(config, core) if s.bf16 else core
    model = DistributedDataParallel(config, DistributedDataParallelConfig(**s.ddp), module)
    config.no_sync_func = model.no_sync
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
        [model],
    )
    config.grad_scale_func = optimizer.scale_loss
    if s.load is not None:
        state = dist_checkpointing.load({"model": core.sharded_state_dict()}, s.load)
        core.load_state_dict(state["model"])
        optimizer.reload_model_params()
    if s.ddp.get("overlap_param_gather"):
        config.param_sync_func = model.start_param_sync
    if s.interrupt:
        interrupted_forward(s, core)
    losses, gradients = [], []
    for step in range(s.first_step, s.first_step + s.steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reduced = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches(s, step),
            model=[model],
            num_microbatches=s.microbatches,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH
            // s.microbatches
            // parallel_state.get_data_parallel_world_size(),
            forward_only=False,
        )
        gradients.append(
            {
                name: parameter.main_grad.detach().clone()
                for name, parameter in core.named_parameters()
                if is_hyper_connection(parameter)
            }
        )
        optimizer.step()
        loss = torch.stack([entry["loss"] for entry in reduced]).mean()
        dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        losses.append((loss / parallel_state.get_data_parallel_world_size()).item())
    if s.ddp.get("overlap_param_gather"):
        model.disable_forward_pre_hook(param_sync=True)
    if s.save is not None:
        dist_checkpointing.save({"model": core.sharded_state_dict()}, s.save)
    names = {parameter: name for name, parameter in core.named_parameters()}
    result = {
        "losses": losses,
        "gradients": gradients,
        "parameters": full_parameters(core),
        "dtypes": {name: str(p.dtype) for name, p in core.named_parameters()},
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
