"""HybridModel without Transformer Engine, in whose classes alone Megatron writes its specs."""

import copy
import dataclasses
from typing import Any

from megatron_mhc.patches.registry import Patch


def _parts(spec: Any, half: str) -> Any:
    """One half of a GPT layer's submodules, attention or MLP, with its norm and residual slot."""
    slots = {
        "attention": ("input_layernorm", "self_attention", "self_attn_bda"),
        "mlp": ("pre_mlp_layernorm", "mlp", "mlp_bda"),
    }[half]
    whole = spec.submodules
    keys = dict(whole.sharded_state_dict_keys_map)
    kept = {name: getattr(whole, name) for name in slots}
    keys = {name: key for name, key in keys.items() if name == f"{slots[0]}."}
    return type(whole)(**kept, sharded_state_dict_keys_map=keys)


def local_stack(original: Any) -> Any:
    """Megatron's HybridStack spec in the modules of its local GPT layers, under the same keys.

    Layers of Mamba and gated delta nets stay as they are: their packages want a GPU anyway.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec as gpt_layer

    halves = {
        "attention_layer": (gpt_layer(), "attention"),
        "mla_layer": (gpt_layer(multi_latent_attention=True), "attention"),
        "mlp_layer": (gpt_layer(), "mlp"),
        "moe_layer": (gpt_layer(num_experts=8, moe_grouped_gemm=False), "mlp"),
    }
    stack = copy.copy(original)
    stack.submodules = copy.copy(original.submodules)
    for field in dataclasses.fields(stack.submodules):
        if field.name in halves:
            layer = copy.copy(getattr(stack.submodules, field.name))
            layer.submodules = _parts(*halves[field.name])
            setattr(stack.submodules, field.name, layer)
    stack.submodules.mtp_block_spec = _local_mtp(stack.submodules.mtp_block_spec)
    return stack


def _local_mtp(original: Any) -> Any:
    """The norms and the projection in front of the layers of multi-token prediction."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    norms = dict.fromkeys(("enorm", "hnorm", "layer_norm"), WrappedTorchNorm)
    block = copy.copy(original)
    block.submodules = copy.copy(original.submodules)
    block.submodules.layer_specs = [copy.copy(layer) for layer in block.submodules.layer_specs]
    for layer in block.submodules.layer_specs:
        layer.submodules = dataclasses.replace(
            layer.submodules, **norms, eh_proj=ColumnParallelLinear
        )
    return block


def _local_norm(original: Any) -> Any:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return WrappedTorchNorm


HYBRID: tuple[Patch, ...] = (
    Patch(
        "cpu-hybrid-stack",
        "megatron.core.models.hybrid.hybrid_layer_specs:hybrid_stack_spec",
        local_stack,
        "Megatron has no local spec for HybridModel: this one has the local GPT's modules",
    ),
    Patch(
        "cpu-hybrid-norm",
        "megatron.core.models.hybrid.hybrid_block:TENorm",
        _local_norm,
        "torch's norm behind the last layer of a HybridStack",
    ),
)
