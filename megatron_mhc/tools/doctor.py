"""`python -m megatron_mhc doctor`: what is installed, which hooks exist, which patches apply."""

import argparse
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from megatron_mhc import MHCConfig
from megatron_mhc.patches import PatchError, registry
from megatron_mhc.patches.cpu import CPU_PATCHES
from megatron_mhc.patches.registry import locate
from megatron_mhc.patches.supported_versions import (
    UnsupportedMegatronError,
    check_release,
    distribution_version,
    is_installed,
    megatron_core_folder,
    megatron_core_version,
)

PACKAGES = ("megatron_mhc", "torch", "triton", "transformer-engine", "apex")
HOOKS = (
    ("megatron.core.transformer.transformer_layer:TransformerLayer", "the layer that gets sites"),
    ("megatron.core.transformer.transformer_layer:TransformerLayerSubmodules", "its slots"),
    ("megatron.core.transformer.transformer_block:TransformerBlockSubmodules", "a block's spec"),
    ("megatron.core.models.hybrid.hybrid_block:HybridStack", "what a HybridModel's layers are in"),
    ("megatron.core.ssm.mamba_layer:MambaLayer", "its layer of another kind"),
    ("megatron.core.fusions.fused_bias_dropout:get_bias_dropout_add", "what mHC replaces"),
    (
        "megatron.core.models.gpt.gpt_layer_specs:get_gpt_decoder_block_spec"
        if is_installed("<0.19")
        else "megatron.training.models.gpt:default_layer_spec",
        "the spec that --mhc goes around",
    ),
)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _megatron_core() -> str:
    """What an import of Megatron-Core finds, and what pip says where that is another one."""
    found, on_record = megatron_core_version(), distribution_version()
    line = "not found" if found is None else f"{found} in {megatron_core_folder()}"
    if on_record != found:
        line += f"; pip has {on_record or 'none'} on record, which is not what runs"
    return line


def _hook_state(target: str) -> str:
    try:
        locate(target)
    except (ImportError, AttributeError) as error:
        return f"MISSING ({error})"
    return "found"


def _parser() -> None:
    from megatron.training.arguments import add_megatron_arguments

    add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(["--mhc"])


def _spec() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_mhc.model.specs import replace_residuals

    replace_residuals(get_gpt_layer_local_spec(), MHCConfig())


def _stack() -> None:
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    from megatron_mhc.model.specs import replace_residuals

    replace_residuals(hybrid_stack_spec, MHCConfig())


TRIALS = (
    ("Megatron's parser, with --mhc", _parser),
    ("a layer's spec with mHC", _spec),
    ("a HybridModel's spec with mHC", _stack),
)


def _trial(what: str, build: Callable[[], None]) -> str:
    try:
        build()
    except (Exception, SystemExit) as error:  # whatever it is, it is what a run would end with
        return f"  ERROR {what}: {type(error).__name__}: {error}"
    return f"  {'built':26} {what}"


def _patch_lines() -> list[str]:
    from megatron_mhc.start.activate import check_turned_off, plugin_patches

    try:
        check_turned_off()
    except PatchError as error:
        return [f"  ERROR {error}"]
    lines = []
    for title, patches, tried in (
        ("Patches of a training run (applied now, to try them)", plugin_patches(), True),
        ("Patches for --cpu (not applied)", CPU_PATCHES, False),
    ):
        lines.append(f"{title}:")
        if tried:
            try:
                registry.apply(*patches)
            except PatchError as error:
                lines.append(f"  ERROR {error}")
        for status in registry.status(*patches):
            reason = f" ({status.reason})" if status.reason else ""
            lines.append(f"  {status.patch.id:26} {status.state}{reason}")
            lines.append(f"  {'':26} {status.patch.target}: {status.patch.why}")
        if tried:
            lines += ["Built with them, to try:", *(_trial(*trial) for trial in TRIALS)]
            registry.undo(*(patch.id for patch in patches))
    return lines


def page() -> tuple[str, bool]:
    """The doctor's whole page, and whether all is well: no line of it says ERROR or MISSING."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (use --cpu)"
    lines = [f"Python {platform.python_version()}, CUDA device: {device}", "Versions:"]
    lines.append(f"  {'megatron-core':26} {_megatron_core()}")
    lines += [f"  {package:26} {_version(package)}" for package in PACKAGES]
    try:
        check_release()
    except UnsupportedMegatronError as error:
        lines.append(f"  ERROR {error}")
    lines.append("Hooks:")
    lines += [f"  {_hook_state(target):26} {target}: {why}" for target, why in HOOKS]
    lines += _patch_lines()
    return "\n".join(lines), not any(line.startswith(("  ERROR", "  MISSING")) for line in lines)
