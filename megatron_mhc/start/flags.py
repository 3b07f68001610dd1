"""The `--mhc*` flags and MHC_* environment variables, and MHCConfig from either."""

import argparse
import copy
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from megatron_mhc.config import Convention, Init, MHCConfig, Variant
from megatron_mhc.kernels.backend import BACKENDS
from megatron_mhc.metrics.monitor import add_monitor_arguments
from megatron_mhc.metrics.monitor import check_arguments as check_monitor_arguments
from megatron_mhc.model.compatibility import check_transformer_config
from megatron_mhc.model.stored_settings import FUNCTION_FIELDS

SPEC = ["megatron_mhc.spec", "gpt_layer_spec"]
"""What `--spec` must name for a model with mHC."""


def _whole(text: str, expected: str = "a whole number") -> int:
    try:
        return int(text)
    except ValueError:
        # argparse puts the flag in front of this, `config_from_environment` the variable
        raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}") from None


def _recompute(text: str) -> int | str | None:
    if text == "off":
        return None
    return text if text == "auto" else _whole(text, "off, auto or a number of layers")


def _switch(text: str) -> bool:
    if text.lower() not in ("0", "1", "false", "true"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected 0 or 1")
    return text.lower() in ("1", "true")


@dataclasses.dataclass(frozen=True)
class _Setting:
    parse: Callable[[str], Any]
    help: str
    choices: tuple[str, ...] | None = None


SETTINGS: Mapping[str, _Setting] = {
    "num_streams": _Setting(_whole, "residual streams (n; kernels exist for 1, 2, 4 and 8)"),
    "sinkhorn_iterations": _Setting(
        _whole, "Sinkhorn-Knopp steps that make H_res doubly stochastic"
    ),
    "convention": _Setting(
        str,
        "'paper', or 'deepseek_v4' for the eps values and the learned head of the V4 checkpoints",
        get_args(Convention),
    ),
    "init": _Setting(
        str,
        "'residual' starts as the ordinary network's function, 'zero' with every bias at zero",
        get_args(Init),
    ),
    "variant": _Setting(
        str, "'mhc', or 'hc' for unconstrained hyper-connections", get_args(Variant)
    ),
    "backend": _Setting(
        str, "'triton' kernels, the 'torch' reference, or 'auto' for what can run", BACKENDS
    ),
    "recompute": _Setting(
        _recompute,
        "drop the streams after the forward and rebuild them in the backward, in blocks of so many"
        " layers; 'auto' takes the number that needs the least memory, 'off' keeps them",
    ),
    "overlap_p2p": _Setting(
        _switch, "overlap pipeline communication and the ends of each stage with the rest"
    ),
    "overlap_in_flight": _Setting(
        _whole,
        "with --mhc-overlap-p2p and 1F1B: microbatches started ahead for each stage behind; 2 hides"
        " the way of a gradient back too, for up to twice the activations",
    ),
}
"""A row a field of MHCConfig."""

VARIABLES: Mapping[str, str] = {f"MHC_{name.upper()}": name for name in SETTINGS}
"""The environment variables, and the field that each one sets."""


def _flag(name: str) -> str:
    return "--mhc-" + name.replace("_", "-")


def add_setting_flags(parser: Any, names: Iterable[str]) -> None:
    """Add a flag for each of these fields of MHCConfig to a parser or a group."""
    for field in dataclasses.fields(MHCConfig):
        if field.name not in names:
            continue
        setting = SETTINGS[field.name]
        flag = _flag(field.name)
        default = "off" if field.default in (None, False) else field.default
        text = f"{setting.help} (default: {default})"
        if setting.parse is _switch:
            parser.add_argument(flag, action="store_true", default=None, help=text)
        else:
            parser.add_argument(flag, type=setting.parse, choices=setting.choices, help=text)


def add_mhc_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--mhc` and a flag for every field of MHCConfig, with its default in the help."""
    group = parser.add_argument_group(
        "mHC", "manifold-constrained hyper-connections (arXiv 2512.24880) by megatron_mhc"
    )
    group.add_argument("--mhc", action="store_true", help="replace residual connections by mHC")
    add_setting_flags(group, SETTINGS)
    add_monitor_arguments(group)
    return parser


def _given(args: argparse.Namespace) -> dict[str, Any]:
    values = {f.name: getattr(args, f"mhc_{f.name}", None) for f in dataclasses.fields(MHCConfig)}
    return {name: value for name, value in values.items() if value is not None}


def config_from_arguments(args: argparse.Namespace) -> MHCConfig:
    """MHCConfig from parsed flags; what was not given has its default.

    Raises:
        ValueError: a value that MHCConfig refuses, or an environment variable beside the flags.
    """
    if found := sorted(VARIABLES.keys() & os.environ.keys()):
        flags = ", ".join(_flag(VARIABLES[variable]) for variable in found)
        raise ValueError(
            f"{', '.join(found)} set in the environment, which is not read where there are flags:"
            f" unset it and give {flags}"
        )
    return MHCConfig(**_given(args))


def flags_of(mhc: MHCConfig) -> str:
    """The command line's flags for these settings: `--mhc`, and those that are no default."""
    flags = ["--mhc"]
    for field in dataclasses.fields(MHCConfig):
        if (value := getattr(mhc, field.name)) != field.default:
            flag = _flag(field.name)
            flags.append(flag if value is True else f"{flag} {value}")
    return " ".join(flags)


def config_from_environment(environ: Mapping[str, str] = os.environ) -> MHCConfig:
    """MHCConfig from MHC_NUM_STREAMS, MHC_CONVENTION, ...; what is not set has its default.

    Raises:
        ValueError: an MHC_* variable that does not exist, or a value that does not fit.
    """
    values = {}
    for variable in sorted(v for v in environ if v.startswith("MHC_")):
        if variable not in VARIABLES:
            raise ValueError(f"{variable} is set; known are {', '.join(sorted(VARIABLES))}")
        name = VARIABLES[variable]
        try:
            values[name] = SETTINGS[name].parse(environ[variable])
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{variable} is {error}") from error
    return MHCConfig(**values)


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
    if list(getattr(stored, "spec", None) or []) != SPEC:
        return
    given = spec if list(spec or []) != SPEC else getattr(args, "mhc_base_spec", None)
    args.mhc_base_spec = getattr(stored, "mhc_base_spec", None) or given
    for name in FUNCTION_FIELDS:
        if getattr(args, f"mhc_{name}", None) is None:
            setattr(args, f"mhc_{name}", getattr(stored, f"mhc_{name}", None))


def prepare_arguments(args: argparse.Namespace) -> None:
    """Before Megatron validates its arguments: point `--spec` at mHC where `--mhc` asks for it.

    Raises:
        ValueError: an mHC setting without `--mhc`, or one that MHCConfig refuses.
    """
    if list(args.spec or []) == SPEC:
        args.mhc = True
    check_monitor_arguments(args)
    if not args.mhc:
        if given := _given(args):
            flags = ", ".join(map(_flag, given))
            raise ValueError(f"{flags} given without --mhc: add --mhc, or drop them")
        return
    config = config_from_arguments(args)
    for name, value in dataclasses.asdict(config).items():
        setattr(args, f"mhc_{name}", value)
    if list(args.spec or []) != SPEC:
        args.mhc_base_spec, args.spec = args.spec, list(SPEC)


def refuse_yaml(args: Any) -> None:
    """Refuse mHC beside `--yaml-cfg`, whose arguments our checks do not understand.

    Args:
        args: what stands in the file; Megatron has forgotten the command line.

    Raises:
        ValueError: the command line or the file asks for mHC.
    """
    flags = [word for word in sys.argv[1:] if word == "--mhc" or word.startswith("--mhc-")]
    flags += [f"{name} in the file" for name in vars(args) if name.split("_")[0] == "mhc"]
    if list(getattr(args, "spec", None) or []) == SPEC:
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


def megatron_arguments() -> argparse.Namespace:
    """Megatron's parsed arguments; empty where it has parsed none: a library user's process."""
    from megatron.training.global_vars import get_args as megatron_args

    try:
        return megatron_args()
    except AssertionError:
        return argparse.Namespace()


def active_config() -> tuple[MHCConfig, str]:
    """The settings of this process, and where they come from: "flags" or "environment"."""
    args = megatron_arguments()
    if getattr(args, "mhc", False):
        return config_from_arguments(args), "flags"
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
