"""The `--mhc*` flags, and MHCConfig from them or from MHC_* environment variables."""

import argparse
import copy
import dataclasses
import os
import sys
from collections.abc import Iterable
from typing import Any

from megatron_mhc.config import CONVENTION_FIELDS, MHCConfig, as_flag
from megatron_mhc.costs.sites import PATTERN
from megatron_mhc.metrics.monitor import add_monitor_arguments
from megatron_mhc.metrics.monitor import check_arguments as check_monitor_arguments
from megatron_mhc.model import native_mhc
from megatron_mhc.model.bare_conflicts import check_placement
from megatron_mhc.model.compatibility import check_transformer_config
from megatron_mhc.model.native_mhc import SHARED
from megatron_mhc.model.stored_settings import FUNCTION_FIELDS
from megatron_mhc.patches import PatchError
from megatron_mhc.patches.supported_versions import SUPPORTED, megatron_core_version

from .environment import config_from_environment, settings_in
from .settings import SETTINGS, flag_of, switch

SPEC = ["megatron_mhc.spec", "gpt_layer_spec"]
HYBRID_SPEC = ["megatron_mhc.spec", "hybrid_stack_spec"]
"""What `--spec` must name for a GPTModel with mHC, and for a HybridModel."""


def _is_ours(spec: Iterable[str] | None) -> bool:
    return list(spec or []) in (SPEC, HYBRID_SPEC)


def _spec_of(args: argparse.Namespace) -> list[str]:
    """Ours for the model that the arguments describe; a layer pattern is all that says hybrid.

    Raises:
        ValueError: `--spec` names what this package has not, or a HybridModel's without a pattern.
    """
    given = list(args.spec or [])
    patterns = (PATTERN, "hybrid_override_pattern")  # the second is its name of old
    is_hybrid = any(getattr(args, name, None) for name in patterns)
    if given and given[0].partition(".")[0] == SPEC[0].partition(".")[0] and not _is_ours(given):
        raise ValueError(
            f"--spec {' '.join(given)} names nothing: give --spec {' '.join(SPEC)} for a GPT model,"
            f" --spec {' '.join(HYBRID_SPEC)} for a HybridModel"
        )
    if given == HYBRID_SPEC and not is_hybrid:
        raise ValueError(
            f"--spec {' '.join(HYBRID_SPEC)} makes a HybridModel's layers, and no"
            " --hybrid-layer-pattern says which: give it, or for a GPT model --spec"
            f" {' '.join(SPEC)}"
        )
    return list(HYBRID_SPEC if is_hybrid else SPEC)


def _is_megatrons(field: dataclasses.Field[Any], parser: Any) -> bool:
    """Whether the parser has this field's flag already, and it is the same one."""
    native = parser._option_string_actions.get(flag_of(field.name))
    return (
        native is not None
        and field.name in SHARED
        and (native.dest, native.default) == (f"mhc_{field.name}", field.default)
        and native.type is type(field.default)
    )


def add_setting_flags(parser: Any, names: Iterable[str]) -> None:
    """Add a flag for each of these fields of MHCConfig to a parser or a group.

    Raises:
        argparse.ArgumentError: the parser has a flag of that name which is another one.
    """
    for field in dataclasses.fields(MHCConfig):
        if field.name not in names or _is_megatrons(field, parser):
            continue
        setting = SETTINGS[field.name]
        flag = flag_of(field.name)
        default = "off" if field.default in (None, False) else field.default
        if field.name in CONVENTION_FIELDS:
            default = "the convention's"
        text = f"{setting.help} (default: {default})"
        if setting.parse is switch and field.name in CONVENTION_FIELDS:  # its name may turn it on
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif setting.parse is switch:
            parser.add_argument(flag, action="store_true", default=None, help=text)
        else:
            parser.add_argument(
                flag,
                type=setting.parse,
                choices=setting.choices,
                metavar=None if setting.choices else setting.metavar,
                help=text,
            )


def add_mhc_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--mhc` and a flag for every field of MHCConfig, with its default in the help.

    Raises:
        PatchError: Megatron has a flag of the same name that is another one.
    """
    group = parser.add_argument_group(
        "mHC", "manifold-constrained hyper-connections (arXiv 2512.24880) by megatron_mhc"
    )
    try:
        group.add_argument("--mhc", action="store_true", help="replace residual connections by mHC")
        add_setting_flags(group, SETTINGS)
        add_monitor_arguments(group)
    except argparse.ArgumentError as error:
        raise PatchError(
            f"Megatron-Core {megatron_core_version()} has a flag of its own where megatron_mhc adds"
            f" one: {error}. Use a release that was tested, {SUPPORTED}, or with_mhc in the script"
        ) from error
    return parser


def _values(args: argparse.Namespace) -> dict[str, Any]:
    values = {f.name: getattr(args, f"mhc_{f.name}", None) for f in dataclasses.fields(MHCConfig)}
    return {name: value for name, value in values.items() if value is not None}


def _given(args: argparse.Namespace) -> set[str]:
    """The fields that the user has set; where the flag is Megatron's too, it has a default."""
    return {
        name
        for name in _values(args)
        if name not in SHARED or native_mhc.on_command_line(flag_of(name))
    }


def config_from_arguments(args: argparse.Namespace) -> MHCConfig:
    """MHCConfig from parsed flags; what was not given has its default.

    Raises:
        ValueError: a value that MHCConfig refuses, or such a variable beside the flags.
    """
    if found := settings_in(os.environ):
        flags = ", ".join(map(flag_of, found.values()))
        raise ValueError(
            f"{', '.join(found)} set in the environment, which is not read where there are flags:"
            f" unset it and give {flags}"
        )
    return MHCConfig(**_values(args))


def flags_of(mhc: MHCConfig) -> str:
    """The command line's flags for these settings: `--mhc`, and those that are no default."""
    flags = ["--mhc"]
    for field in dataclasses.fields(MHCConfig):
        value = getattr(mhc, field.name)
        by_name = field.name in CONVENTION_FIELDS and field.name not in mhc.overrides
        if not by_name and value != field.default:
            flags.append(as_flag(field.name, value))
    return " ".join(flags)


def take_from_checkpoint(
    args: argparse.Namespace, spec: list[str] | None, stored: argparse.Namespace
) -> None:
    """What `--use-checkpoint-args` takes of a model with mHC: all that makes its function.

    As Megatron does it: the checkpoint's spec wins over the command line's, and a setting that was
    given stays (and is refused when the checkpoint is loaded, if it is another one).

    Args:
        args: Megatron's, into which it has taken the checkpoint's by now.
        spec: the command line's `--spec`.
        stored: the checkpoint's arguments.
    """
    if not _is_ours(getattr(stored, "spec", None)):
        return
    given = spec if not _is_ours(spec) else getattr(args, "mhc_base_spec", None)
    args.mhc_base_spec = getattr(stored, "mhc_base_spec", None) or given
    taken = set(FUNCTION_FIELDS) - _given(args)
    if "convention" not in taken:
        taken -= set(CONVENTION_FIELDS)
    for name in taken:
        if hasattr(stored, f"mhc_{name}"):
            setattr(args, f"mhc_{name}", getattr(stored, f"mhc_{name}"))


def prepare_arguments(args: argparse.Namespace) -> None:
    """Before Megatron validates its arguments: point `--spec` at mHC where `--mhc` asks for it.

    Raises:
        ValueError: an mHC setting without `--mhc`, or one that MHCConfig refuses; a `--spec` that
            names nothing of ours.
    """
    ours = _spec_of(args)
    if _is_ours(args.spec):
        args.mhc = True
    check_monitor_arguments(args)
    if not args.mhc:
        given = _given(args)
        if native_mhc.is_on(args):  # then a flag that both have is Megatron's
            given -= set(SHARED)
        if given:
            flags = ", ".join(map(flag_of, sorted(given)))
            raise ValueError(f"{flags} given without --mhc: add --mhc, or drop them")
        return
    config = config_from_arguments(args)
    for name, value in dataclasses.asdict(config).items():
        setattr(args, f"mhc_{name}", value)
    if not _is_ours(args.spec):
        args.mhc_base_spec = args.spec
    args.spec = ours


def refuse_yaml(args: Any) -> None:
    """Refuse mHC beside `--yaml-cfg`, whose arguments our checks do not understand.

    Args:
        args: what stands in the file; Megatron has forgotten the command line.

    Raises:
        ValueError: the command line or the file asks for mHC.
    """
    native = {*native_mhc.OURS}
    if native_mhc.is_on(args):
        native |= {f"mhc_{name}" for name in SHARED}
    flags = [
        word for word in sys.argv[1:] if word == "--mhc" or word.startswith(("--mhc-", "--no-mhc-"))
    ]
    flags = [word for word in flags if word.split("=")[0][2:].replace("-", "_") not in native]
    names = [name for name in vars(args) if name.split("_")[0] == "mhc" and name not in native]
    flags += [f"{name} in the file" for name in names]
    if _is_ours(getattr(args, "spec", None)):
        flags.append("spec in the file")
    if flags:
        raise ValueError(
            f"{', '.join(flags)} beside --yaml-cfg {args.yaml_cfg}: Megatron takes its settings"
            " from that file alone, and neither the flags nor a check of them reach the model."
            " Give Megatron's settings as flags, without --yaml-cfg"
        )


def check_arguments(args: argparse.Namespace) -> None:
    """After Megatron validated its arguments: refuse what mHC cannot work with.

    Raises:
        ValueError: names every such flag and what to do about it.
    """
    if args.mhc:
        check_transformer_config(args, config_from_arguments(args))
        check_placement(args)


def megatron_arguments() -> argparse.Namespace:
    """Megatron's parsed arguments; empty where it has parsed none: a library user's process."""
    from megatron.training.global_vars import get_args as megatron_args

    try:
        return megatron_args()
    except AssertionError:
        return argparse.Namespace()


def active_config() -> tuple[MHCConfig, str]:
    """The settings of this process, and where they come from: "flags" or "environment".

    Raises:
        ValueError: settings that are refused; a flag that Megatron parses for itself alone here.
    """
    args = megatron_arguments()
    if getattr(args, "mhc", False):
        return config_from_arguments(args), "flags"
    for name in SHARED:
        if native_mhc.on_command_line(flag := flag_of(name)):
            raise ValueError(
                f"{flag} sets Megatron's own mHC, as this script does not know --mhc: set"
                f" MHC_{name.upper()} in the environment"
            )
    return config_from_environment(), "environment"


def base_spec() -> list[str] | None:
    """The user's own `--spec MODULE NAME` that mHC goes around, or None."""
    args = megatron_arguments()
    if not hasattr(args, "mhc") and getattr(args, "use_checkpoint_args", False):
        # `--spec` came from the checkpoint, and no patch of ours took what belongs to it
        return _base_spec_in_checkpoint(args)
    return getattr(args, "mhc_base_spec", None)


def _base_spec_in_checkpoint(args: argparse.Namespace) -> list[str] | None:
    from megatron.training.checkpointing import load_args_from_checkpoint

    args = copy.copy(args)
    for folder in ("pretrained_checkpoint", "load"):
        result = load_args_from_checkpoint(args, load_arg=folder)
        if isinstance(result, tuple):
            take_from_checkpoint(args, None, result[1])
    return getattr(args, "mhc_base_spec", None)
