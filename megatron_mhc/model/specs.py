"""A spec of Megatron's, of whatever kind, with mHC's layers in the place of its own."""

import copy
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

from megatron_mhc.config import MHCConfig

from .layer import MHCLayer, mhc_layer


def replace_residuals[
    Spec: (
        ModuleSpec,
        TransformerBlockSubmodules,
        MultiTokenPredictionBlockSubmodules,
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
    if not isinstance(spec, ModuleSpec):
        raise ValueError(
            f"spec is {spec!r}; expected a layer's ModuleSpec, a list of them or a"
            " TransformerBlockSubmodules (call a spec function before with_mhc)"
        )
    if isinstance(spec.module, type) and issubclass(spec.module, TransformerBlock):
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


def _layer_with_mhc(spec: ModuleSpec, config: MHCConfig) -> ModuleSpec:
    layer_class = mhc_layer(spec.module)
    for slot in ("self_attn_bda", "mlp_bda"):
        filler = getattr(spec.submodules, slot)
        if filler is not get_bias_dropout_add:
            raise ValueError(
                f"the spec's residual slot {slot} holds {filler!r}; mHC replaces"
                " get_bias_dropout_add and nothing else"
            )
    if spec.submodules.cross_attention is not IdentityOp:
        raise ValueError("the spec has cross attention, for which mHC has no site")
    replaced = copy.copy(spec)
    replaced.module = layer_class
    # build_module hands the params of a spec to the class
    replaced.params = {**spec.params, "mhc": config}
    # TransformerLayer rewrites entries of its submodules while it is built
    replaced.submodules = copy.copy(spec.submodules)
    return replaced
