"""mHC as a spec: `with_mhc` for any of Megatron's; `gpt_layer_spec`, `hybrid_stack_spec` for
`--spec`."""

import inspect
from typing import Any

from megatron_mhc.patches import registry
from megatron_mhc.patches.spec_function import spec_function_patches
from megatron_mhc.patches.supported_versions import check_release

# Before anything that another release may lack is imported: where `--spec` cannot import this
# module, Megatron trains the ordinary model. And of ours nothing but this runs before 0.18 builds.
check_release()
registry.apply(*spec_function_patches())

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
)
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from .config import MHCConfig
from .model.specs import replace_residuals
from .model.stack import check_hybrid
from .start.activate import check_turned_off, loader_patches, model_patches, spec_patch
from .start.banner import announce_spec
from .start.flags import active_config, base_spec

registry.apply(spec_patch())  # HybridModel calls no spec that is a function either


def with_mhc[
    Spec: (
        ModuleSpec,
        TransformerBlockSubmodules,
        MultiTokenPredictionBlockSubmodules,
        HybridStackSubmodules,
        list[ModuleSpec],
    )
](spec: Spec, config: MHCConfig | None = None) -> Spec:
    """The same spec with mHC instead of residual connections; the argument is left as it was.

    Also applies the patches that a model with mHC needs (`activate.model_patches`): none for its
    layers, but its parameters want no weight decay and a checkpoint that keeps them apart.

    Args:
        spec: what Megatron's spec functions return: a layer's ModuleSpec, a list of them, a
            TransformerBlockSubmodules, or a ModuleSpec of a TransformerBlock; a HybridStack's
            ModuleSpec or its HybridStackSubmodules; or the spec of multi-token prediction (which a
            GPTModel with mHC gives the same settings by itself).
        config: the settings, the defaults if None.

    Returns:
        A spec of the same kind.

    Raises:
        ValueError: a layer that is no TransformerLayer (nor a HybridStack's MambaLayer), has mHC
            already, fills its residual slots with something else than Megatron's bias-dropout-add
            (a HybridStack's more than one), or has cross attention.
        PatchError: a Megatron-Core of a version that the plugin does not know, or an unknown id in
            MEGATRON_MHC_PATCHES.
        TypeError: config is no MHCConfig.
    """
    if config is not None and not isinstance(config, MHCConfig):
        raise TypeError(f"config is {config!r}; expected an MHCConfig, as MHCConfig(num_streams=4)")
    check_turned_off()
    registry.apply(*model_patches(), *loader_patches())
    return replace_residuals(spec, MHCConfig() if config is None else config)


def gpt_layer_spec(model_config: Any, vp_stage: int | None = None) -> Any:
    """The spec that Megatron would choose, with mHC: `--spec megatron_mhc.spec gpt_layer_spec`.

    Args:
        model_config: Megatron's GPTModelConfig; its TransformerConfig where there is none (0.18).
        vp_stage: the virtual pipeline stage.

    Returns:
        A spec for GPTModel. Settings come from the `--mhc*` flags where the runner or
        `megatron_mhc.auto` added them, else from MHC_* environment variables, else the defaults.
    """
    config, source = active_config()
    if source == "environment":
        announce_spec(config, source, _transformer_config(model_config))
    return with_mhc(_base_layer_spec(model_config, vp_stage), config)


def hybrid_stack_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The same for a HybridModel: `--spec megatron_mhc.spec hybrid_stack_spec`.

    Args:
        config: the model's TransformerConfig.
        vp_stage: as a GPTModel would hand it over; a stack's spec is the same for all.

    Returns:
        A HybridStack's spec with mHC: around the one that `--spec` named beside `--mhc`, else
        around Megatron's own, which wants Transformer Engine.

    Raises:
        ValueError: what is being built is no HybridModel.
    """
    from megatron.core.models.hybrid import hybrid_layer_specs

    check_hybrid(config)
    mhc, source = active_config()
    if source == "environment":
        announce_spec(mhc, source, config)
    named = base_spec()
    if named is None:
        return with_mhc(hybrid_layer_specs.hybrid_stack_spec, mhc)
    return with_mhc(_imported(named), mhc)


def _transformer_config(model_config: Any) -> Any:
    return getattr(model_config, "transformer", model_config)


def _base_layer_spec(model_config: Any, vp_stage: int | None) -> Any:
    """The spec that `--spec` named beside `--mhc`, else the one that Megatron chooses by itself."""
    named = base_spec()
    if named is None:
        return _default_layer_spec(model_config, vp_stage)
    spec = _imported(named)
    if isinstance(spec, ModuleSpec) or not callable(spec):
        return spec
    takes_stage = "vp_stage" in inspect.signature(spec).parameters
    return spec(model_config, vp_stage=vp_stage) if takes_stage else spec(model_config)


def _imported(named: list[str]) -> Any:
    spec = import_module(named)
    if spec is None:
        raise ValueError(
            f"--spec {' '.join(named)} could not be imported (Megatron prints why, above): give a"
            " module that Python finds and the name of a spec in it"
        )
    return spec


def _default_layer_spec(model_config: Any, vp_stage: int | None) -> Any:
    """What Megatron's pretrain_gpt.py builds without `--spec`."""
    if hasattr(model_config, "transformer"):
        from megatron.training.models.gpt import default_layer_spec

        return default_layer_spec(model_config, vp_stage)
    # 0.18 chooses in its script's gpt_builders.py, which is in no package
    use_te = model_config.transformer_impl == "transformer_engine"
    settings = {"normalization": model_config.normalization, "qk_l2_norm": model_config.qk_l2_norm}
    if model_config.num_moe_experts is None:
        return get_gpt_decoder_layer_specs(model_config, use_te, **settings)[0]
    return get_gpt_decoder_block_spec(model_config, use_te, **settings, vp_stage=vp_stage)
