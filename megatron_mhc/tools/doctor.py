"""`python -m megatron_mhc doctor`: whether mHC can train here, and what an issue needs to know."""

import argparse
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

import megatron_mhc
from megatron_mhc import MHCConfig
from megatron_mhc.patches import PatchError, registry
from megatron_mhc.patches.cpu import CPU_PATCHES
from megatron_mhc.patches.registry import PatchStatus, locate
from megatron_mhc.patches.supported_versions import (
    SUPPORTED,
    UnsupportedMegatronError,
    check_release,
    distribution_version,
    is_installed,
    megatron_core_folder,
    megatron_core_version,
)

PACKAGES = ("torch", "triton", "transformer-engine", "apex")
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
    ("Megatron's parser with --mhc", _parser),
    ("a layer's spec with mHC", _spec),
    ("a HybridModel's spec with mHC", _stack),
)


def _trial_problem(what: str, build: Callable[[], None]) -> list[str]:
    try:
        build()
    except (Exception, SystemExit) as error:  # whatever it is, it is what a run would end with
        return [f"{what}: {type(error).__name__}: {error}"]
    return []


class _Findings(NamedTuple):
    """What was looked at.

    Attributes:
        summary: a line for each kind of thing, for an issue.
        problems: a sentence for each thing that is wrong; no line without one is all that is well.
        every: a line for each hook, patch and trial.
    """

    summary: list[str]
    problems: list[str]
    every: list[str]


def _row(name: str, what: str) -> str:
    return f"  {name:26} {what}"


def _hooks() -> _Findings:
    problems, every = [], ["Hooks:"]
    for target, why in HOOKS:
        state = "found"
        try:
            locate(target)
        except (ImportError, AttributeError) as error:
            state = "MISSING"
            problems.append(
                f"Megatron-Core {megatron_core_version()} has no {target} ({why}): {error}. It is"
                f" altered, or newer than what was tried; pip install 'megatron-core{SUPPORTED}'"
            )
        every.append(_row(state, f"{target}: {why}"))
    line = f"{len(HOOKS) - len(problems)} of {len(HOOKS)} found"
    return _Findings([_row("hooks", line)], problems, every)


def _lines_of(title: str, states: list[PatchStatus]) -> list[str]:
    lines = [f"{title}:"]
    for status in states:
        reason = f" ({status.reason})" if status.reason else ""
        lines.append(_row(status.patch.id, f"{status.state}{reason}"))
        lines.append(_row("", f"{status.patch.target}: {status.patch.why}"))
    return lines


def _patches() -> _Findings:
    """Of the patches of a training run, which are applied to try them, and of specs with them."""
    from megatron_mhc.start.activate import check_turned_off, plugin_patches

    try:
        check_turned_off()
    except PatchError as error:
        return _Findings([], [str(error)], [])
    patches, problems = plugin_patches(), []
    try:
        registry.apply(*patches)
    except PatchError as error:
        problems.append(str(error))
    states = registry.status(*patches)
    failed = {what: _trial_problem(what, build) for what, build in TRIALS}
    registry.undo(*(patch.id for patch in patches))
    problems += [problem for found in failed.values() for problem in found]
    others = [f"{s.patch.id} {s.state} {s.reason}".strip() for s in states if s.state != "applied"]
    well = [what for what in failed if not failed[what]]
    summary = [
        _row("patches", "; ".join([f"{len(states) - len(others)} applied", *others])),
        _row("built with them", "; ".join(well) or "nothing"),
    ]
    every = _lines_of("Patches of a training run (applied now, to try them)", states)
    every += _lines_of("Patches for --cpu (not applied)", registry.status(*CPU_PATCHES))
    return _Findings(summary, problems, every)


def _versions() -> list[str]:
    """What an issue needs to know of this machine and what is installed on it."""
    gpus = Counter(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    cuda = f" (PyTorch's CUDA {torch.version.cuda})"
    devices = ", ".join(f"{count} x {name}" for name, count in gpus.items())
    ours = Path(megatron_mhc.__file__).parent
    names = sorted(name for name in os.environ if name.startswith(("MHC_", "MEGATRON_MHC_")))
    set_here = [f"{name}={os.environ[name]}" for name in names]
    return [
        _row("megatron_mhc", f"{megatron_mhc.__version__} in {ours}"),
        _row("megatron-core", _megatron_core()),
        *(_row(package, _version(package)) for package in PACKAGES),
        _row("python", f"{platform.python_version()} ({sys.executable})"),
        _row("system", platform.platform()),
        _row("GPU", devices + cuda if gpus else "none"),
        *([_row("environment", " ".join(set_here))] if set_here else []),
    ]


def _verdict(problems: list[str]) -> list[str]:
    """The first line, and one for each problem but the first."""
    if not problems:
        device = "" if torch.cuda.is_available() else "; there is no GPU here, so with --cpu"
        return [f"doctor: all is well, Megatron-Core {megatron_core_version()} can train{device}"]
    more = f" ({len(problems) - 1} more below)" if len(problems) > 1 else ""
    return [
        f"doctor: ERROR{more}: {problems[0]}",
        *(f"  ERROR {problem}" for problem in problems[1:]),
    ]


def page(with_patches: bool = False) -> tuple[str, bool]:
    """The doctor's whole page, and whether all is well.

    Args:
        with_patches: with a line for every hook and patch, those for `--cpu` too.
    """
    try:
        check_release()
        found = [_hooks(), _patches()]
    except UnsupportedMegatronError as error:
        # the rest would say the same in other words
        found = [_Findings([_row("patches", "not tried")], [str(error)], [])]
    problems = [problem for one in found for problem in one.problems]
    lines = [*_verdict(problems), "", "What to paste into an issue:"]
    lines += [*_versions(), *(line for one in found for line in one.summary)]
    if with_patches:
        lines += ["", *(line for one in found for line in one.every)]
    else:
        lines += ["", "Every hook and patch with its state: doctor --patches"]
    return "\n".join(lines), not problems
