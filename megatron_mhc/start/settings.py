"""How users give each field of MHCConfig: a row a field, for its flag and its variable."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, get_args

from megatron_mhc.config import CONVENTIONS, End, Init, Variant
from megatron_mhc.kernels.arguments import NORM_FORMS, SINKHORN_ORDERS
from megatron_mhc.kernels.backend import BACKENDS


def _whole(text: str, expected: str = "a whole number") -> int:
    try:
        return int(text)
    except ValueError:
        # argparse puts the flag in front of this, `config_from_environment` the variable
        raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number") from None


def _recompute(text: str) -> int | str | None:
    if text == "off":
        return None
    return text if text == "auto" else _whole(text, "off, auto or a number of layers")


def switch(text: str) -> bool:
    """The value of a switch in an environment variable; its flag takes none."""
    if text.lower() not in ("0", "1", "false", "true"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected 0 or 1")
    return text.lower() in ("1", "true")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How text becomes the value of a field, and what `--help` says of it."""

    parse: Callable[[str], Any]
    help: str
    choices: tuple[str, ...] | None = None

    @property
    def metavar(self) -> str:
        """What stands for a value in `--help`, where no choices do."""
        names: dict[Any, str] = {_whole: "N", _number: "X", _recompute: "N|auto|off"}
        return names.get(self.parse, "VALUE")


SETTINGS: Mapping[str, Setting] = {
    "num_streams": Setting(_whole, "residual streams (n; kernels exist for 1, 2, 4 and 8)"),
    "sinkhorn_iterations": Setting(
        _whole, "Sinkhorn-Knopp steps that make H_res doubly stochastic"
    ),
    "convention": Setting(
        str,
        "whose hyper-connections: sets what is not given of the flags from --mhc-norm-eps on",
        tuple(CONVENTIONS),
    ),
    "init": Setting(
        str,
        "'residual' starts as the ordinary network's function, 'zero' with every bias at zero",
        get_args(Init),
    ),
    "variant": Setting(
        str, "'mhc', or 'hc' for unconstrained hyper-connections", get_args(Variant)
    ),
    "backend": Setting(
        str, "'triton' kernels, the 'torch' reference, or 'auto' for what can run", BACKENDS
    ),
    "recompute": Setting(
        _recompute,
        "drop the streams after the forward and rebuild them in the backward, in blocks of so many"
        " layers; 'auto' takes the number that needs the least memory, 'off' keeps them",
    ),
    "overlap_p2p": Setting(
        switch, "overlap pipeline communication and the ends of each stage with the rest"
    ),
    "overlap_in_flight": Setting(
        _whole,
        "with --mhc-overlap-p2p and 1F1B: microbatches started ahead for each stage behind; 2 hides"
        " the way of a gradient back too, for up to twice the activations",
    ),
    "norm_eps": Setting(_number, "eps in the norm of the streams"),
    "norm_form": Setting(
        str, "where it stands: 1 / sqrt(mean square + eps), or 1 / (rms + eps)", NORM_FORMS
    ),
    "pre_eps": Setting(_number, "eps on H_pre after the sigmoid"),
    "sinkhorn_eps": Setting(_number, "eps on the sums that Sinkhorn divides by"),
    "sinkhorn_order": Setting(
        str, "what Sinkhorn divides by first: the sums over dst, or over src", SINKHORN_ORDERS
    ),
    "end": Setting(
        str,
        "what makes one stream of n at the end: their mean, a learned head, the last site's H_pre",
        get_args(End),
    ),
    "delayed": Setting(switch, "a site reads with the H_pre of the site before (single pass)"),
    "head_eps": Setting(_number, "eps of the learned head, in its norm and on its weights"),
}
"""A row a field of MHCConfig."""

VARIABLES: Mapping[str, str] = {f"MHC_{name.upper()}": name for name in SETTINGS}
"""The environment variables, and the field that each one sets."""


def flag_of(name: str) -> str:
    """The flag that sets this field of MHCConfig."""
    return "--mhc-" + name.replace("_", "-")
