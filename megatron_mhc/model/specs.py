"""A spec of Megatron's, of whatever kind, with mHC's layers in the place of its own."""

import copy
import dataclasses
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

from megatron_mhc.config import MHCConfig

from .layer import MHCLayer
from .layer_classes import mhc_layer


def replace_residuals[
    Spec: (
        ModuleSpec,
        TransformerBlockSubmodules,
        MultiTokenPredictionBlockSubmodules,
        HybridStackSubmodules,
        list[ModuleSpec],
    )
](spec: Spec, config: MHCConfig) -> Spec:
    """The same spec with mHC instead of residual connections; the argument is left as it was.

    Args, Returns, Raises: as for `spec.with_mhc`.
    """
    if isinstance(spec, list):
        return [_layer_with_mhc(layer, config) for layer in spec]
    if isinstance(spec, TransformerBlockSubmodules):
        replaced = copy.copy(spec)
        replaced.layer_specs = [_layer_with_mhc(layer, config) for layer in spec.layer_specs or []]
        return replaced
    if isinstance(spec, MultiTokenPredictionBlockSubmodules):
        mtp_spec = copy.copy(spec)
        mtp_spec.layer_specs = [_mtp_with_mhc(layer, config) for layer in spec.layer_specs or []]
        return mtp_spec
    if isinstance(spec, HybridStackSubmodules):
        names = [f.name for f in dataclasses.fields(spec) if _is_layer(getattr(spec, f.name))]
        if not names:
            raise ValueError(
                "the spec of a HybridStack has no layer to give mHC to: none of its slots holds a"
                " ModuleSpec; fill those of the kinds of layers that the model has"
            )
        replaced = copy.copy(spec)
        for name in names:
            layer = _layer_with_mhc(getattr(spec, name), config, in_stack=True)
            setattr(replaced, name, layer)
        return replaced
    if not isinstance(spec, ModuleSpec):
        raise ValueError(
            f"spec is {spec!r}; expected a layer's ModuleSpec, a list of them, a"
            " TransformerBlockSubmodules or a HybridStackSubmodules (call a spec function before"
            " with_mhc)"
        )
    if isinstance(spec.module, type) and issubclass(spec.module, (TransformerBlock, HybridStack)):
        replaced = copy.copy(spec)
        replaced.submodules = replace_residuals(spec.submodules, config)
        return replaced
    return _layer_with_mhc(spec, config)


def _has_mhc(layer: Any) -> bool:
    module = getattr(layer, "module", None)
    return isinstance(module, type) and issubclass(module, MHCLayer)


def _mtp_with_mhc(spec: ModuleSpec, config: MHCConfig) -> ModuleSpec:
    """A layer of multi-token prediction whose Transformer layer has mHC (or keeps it)."""
    replaced = copy.copy(spec)
    replaced.submodules = copy.copy(spec.submodules)
    inner = replaced.submodules.mtp_model_layer
    if not _has_mhc(inner):
        replaced.submodules.mtp_model_layer = _layer_with_mhc(inner, config)
    return replaced


def like_decoder(decoder: Any, mtp: Any) -> Any:
    """The spec of multi-token prediction with the decoder's mHC, if the decoder has it.

    Args:
        decoder: the spec that a GPTModel gets for its decoder.
        mtp: the one that it gets for multi-token prediction, or None.
    """
    submodules = getattr(decoder, "submodules", decoder)
    layers = getattr(submodules, "layer_specs", None) or [decoder]
    settings = [layer.params["mhc"] for layer in layers if _has_mhc(layer)]
    return replace_residuals(mtp, settings[-1]) if settings and mtp is not None else mtp


def has_mhc(spec: Any) -> bool:
    """Whether a HybridStack's spec has mHC on its layers."""
    submodules = getattr(spec, "submodules", None)
    return submodules is not None and any(map(_has_mhc, vars(submodules).values()))


def _is_layer(spec: Any) -> bool:
    """Whether a slot of a HybridStack holds a layer: not nothing, and not multi-token prediction,
    which builds its layers from the others' slots."""
    return isinstance(spec, ModuleSpec) and spec.module is not MultiTokenPredictionBlock


def _residual_slots(spec: ModuleSpec, in_stack: bool) -> dict[str, Any]:
    """What fills the residual slots that must be mHC's to fill: all, or a stack's layer's one."""
    slots = ("mamba_bda",) if issubclass(spec.module, MambaLayer) else ("self_attn_bda", "mlp_bda")
    fillers = {slot: getattr(spec.submodules, slot) for slot in slots}
    if not in_stack:
        return fillers
    filled = {s: f for s, f in fillers.items() if f not in (IdentityFuncOp, IdentityOp)}
    if len(filled) != 1:
        raise ValueError(
            f"a layer of a HybridStack has one sublayer, and the spec of {spec.module.__name__}"
            f" fills {' and '.join(filled) or 'no residual slot'}: give each its own layer"
        )
    return filled


def _layer_with_mhc(spec: ModuleSpec, config: MHCConfig, in_stack: bool = False) -> ModuleSpec:
    layer_class = mhc_layer(spec.module)
    if issubclass(spec.module, MambaLayer) and not in_stack:
        raise ValueError("mHC knows a MambaLayer in a HybridStack alone: give with_mhc its spec")
    fillers = _residual_slots(spec, in_stack)
    for slot, filler in fillers.items():
        if filler is not get_bias_dropout_add:
            raise ValueError(
                f"the spec's residual slot {slot} holds {filler!r}, and mHC"
                " replaces get_bias_dropout_add alone: put that there (its import from"
                " megatron.core.fusions.fused_bias_dropout), or keep this layer without mHC"
            )
    if getattr(spec.submodules, "cross_attention", IdentityOp) is not IdentityOp:
        raise ValueError(
            "the spec has cross attention, for which mHC has no site: give with_mhc the spec of"
            " layers without (a GPT's, not a T5's)"
        )
    replaced = copy.copy(spec)
    replaced.module = layer_class
    # build_module hands the params of a spec to the class
    replaced.params = {**spec.params, "mhc": config} | ({"in_stack": True} if in_stack else {})
    # TransformerLayer rewrites entries of its submodules while it is built
    replaced.submodules = copy.copy(spec.submodules)
    return replaced
