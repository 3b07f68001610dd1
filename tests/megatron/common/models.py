"""The tiny Megatron-Core GPT model that a scenario trains.

Importing this readies Megatron for the CPU.
"""

import functools
import itertools
import re
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_mhc import MHCConfig
from megatron_mhc.patches import cpu

cpu.enter()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt import gpt_layer_specs as specs  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import MLATransformerConfig, TransformerConfig  # noqa: E402

from megatron_mhc import with_mhc  # noqa: E402
from megatron_mhc.model.connection import initial_bias  # noqa: E402
from megatron_mhc.model.parameters import is_hyper_connection  # noqa: E402
from tests.megatron.common import hybrid  # noqa: E402
from tests.megatron.common.scenario import SEQUENCE, VOCABULARY, Scenario  # noqa: E402


def transformer_config(s: Scenario) -> TransformerConfig:
    """The tiny model's TransformerConfig."""
    settings: dict[str, Any] = {
        "num_layers": hybrid.layers_in(s.pattern) if s.pattern else 4,
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
    kind = MLATransformerConfig if "mla" in s.kind else TransformerConfig
    overlaps = bool(s.config.get("overlap_moe_expert_parallel_comm"))
    # Megatron wants bf16 with it; in fp32 nothing but the order of sums tells two runs apart
    config = kind(**(settings | {"bf16": s.bf16 or overlaps} | s.config))
    config.bf16 = s.bf16
    return config


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
    if s.pattern is not None:
        return hybrid.stack_spec()
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
    leaves = list(_leaves(state))
    for leaf in leaves if pairs_of_a_gpt(model) else ():
        leaf.key = hybrid.gpt_key(leaf.key)
    return leaves


def pairs_of_a_gpt(model: Any) -> bool:
    """Whether this is a HybridModel whose layers are, two by two, those of a GPT."""
    pattern = getattr(model, "hybrid_layer_pattern", None) or ""
    return bool(pattern) and re.fullmatch(r"(\|?[*+]\|?[-E])+(/[*+][-E])*", pattern) is not None


def mhc_config(s: Scenario) -> MHCConfig:
    """Its settings, with the scenario's number of iterations where variant mhc leaves it open."""
    assert s.mhc is not None
    if s.mhc.get("variant", "mhc") == "mhc":
        return MHCConfig(**{"sinkhorn_iterations": s.sinkhorn_iterations, **s.mhc})
    return MHCConfig(**s.mhc)


def build(s: Scenario, config: TransformerConfig) -> list[GPTModel]:
    """This rank's model chunks, with the same initial weights in every scenario of their kind."""
    virtual = config.virtual_pipeline_model_parallel_size
    return [build_chunk(s, config, chunk if virtual else None) for chunk in range(virtual or 1)]


def gpt(s: Scenario, config: TransformerConfig, spec: Any, mtp: Any, chunk: int | None) -> GPTModel:
    """One chunk of a GPT."""
    return GPTModel(
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


def build_chunk(s: Scenario, config: TransformerConfig, chunk: int | None) -> GPTModel:
    """One chunk of the model. Its weights are those of the whole model, built alike everywhere."""
    model_parallel_cuda_manual_seed(7)
    spec = layer_spec(s, config, chunk)
    mtp = None
    if config.mtp_num_layers and s.pattern is None:
        mtp = specs.get_gpt_mtp_block_spec(config, spec, False, vp_stage=chunk)
    if s.mhc is not None:
        spec = with_mhc(spec, mhc_config(s))
    if s.pattern is None:
        model = gpt(s, config, spec, mtp, chunk)
    else:
        model = hybrid.build(s, config, spec, chunk)
    drop_layers(s, model)
    seed_weights(model, s.perturb)
    for parameter in model.parameters():
        if s.unmarked and is_hyper_connection(parameter):
            parameter.sequence_parallel = False
    for layer in model.decoder.layers if s.mhc is not None else ():
        layer.fuses_with_next &= s.fuse == "all"
        if s.fuse == "none":
            layer.sites[0].following = None
    if s.checkpoint is not None:
        put_under_a_checkpoint(model, s.checkpoint)
    return model


def put_under_a_checkpoint(model: GPTModel, kind: str) -> None:
    """As `Scenario.checkpoint` says."""
    if kind == "full":
        config = model.config
        config.recompute_granularity, config.recompute_method = "full", "block"
        config.recompute_num_layers = 3
        return
    for layer in model.decoder.layers[::2]:
        layer.forward = functools.partial(_under_a_checkpoint, kind, layer.forward)


def _under_a_checkpoint(kind: str, forward: Any, hidden_states: Tensor, **named: Any) -> Any:
    run = functools.partial(forward, **named)
    return checkpoint(run, hidden_states, use_reentrant=kind == "reentrant")


def drop_layers(s: Scenario, model: GPTModel) -> None:
    """Shorten a built model as tools for compression do; sites start as in one built so short."""
    kept = [number for number in range(1, model.config.num_layers + 1) if number - 1 not in s.drop]
    layers = [layer for layer in model.decoder.layers if layer.layer_number in kept]
    if not s.drop:
        return
    for layer in layers:
        layer.layer_number = kept.index(layer.layer_number) + 1
        for index, site in enumerate(layer.sites, layer.first_index):
            site.connection.bias.data.copy_(initial_bias(layer.mhc, index))
    model.decoder.layers = torch.nn.ModuleList(layers)
    model.decoder.num_layers_per_pipeline_rank = len(layers)  # full recompute counts by it
    model.config.num_layers = len(kept)


def full_parameters(chunks: list[GPTModel]) -> dict[str, Tensor]:
    """On rank 0 every parameter of the whole model by its checkpoint key, put together."""
    shards = []
    for leaf in (leaf for chunk in chunks for leaf in whole_model_shards(chunk)):
        data = leaf.data.detach().contiguous()
        # pickle is slow with a tensor, and numpy knows no bf16
        content = data.flatten().view(torch.uint8).numpy().tobytes()
        shape = tuple(leaf.global_shape)
        shards.append((leaf.key, shape, leaf.global_offset, data.dtype, data.shape, content))
    is_first = dist.get_rank() == 0
    gathered: list[Any] | None = [None] * dist.get_world_size() if is_first else None
    dist.gather_object(shards, gathered)
    full: dict[str, Tensor] = {}
    for key, shape, offset, dtype, part, content in itertools.chain(*(gathered or ())):
        data = torch.frombuffer(bytearray(content), dtype=dtype)
        # a shard of a stack (of experts, say) lacks the axes that it is stacked along
        data = data.view((1,) * (len(shape) - len(part)) + tuple(part))
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
