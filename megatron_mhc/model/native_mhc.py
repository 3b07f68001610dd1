"""Megatron's own mHC, from 0.20 on and on its dev branch: on beside ours, it is refused.

With it on and ours off, the plugin changes nothing: its patches look at marks of its own alone.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from megatron_mhc.config import MHCConfig

from .conflict import Conflict, is_set

SWITCHES = {
    "enable_mhc_connections": "--enable-mhc-connections",
    "enable_hyper_connections": "--enable-hyper-connections",  # dev's name
    "wide_residual": "--wide-residual",  # several streams that are mixed in another way
}
"""What turns native streams on: the settings' names, and their flags."""

OURS = {
    "mhc_num_residual_streams": "--mhc-num-streams",
    "num_residual_streams": "--mhc-num-streams",
    "mhc_recompute_layer_num": "--mhc-recompute",
    "mhc_init_gating_factor": "--mhc-init",
    "use_fused_mhc": "--mhc-backend",
    "mhc_fused_backend": "--mhc-backend",
}
"""What sets native mHC up, and our flag for the same matter."""

SHARED = ("sinkhorn_iterations",)
"""Fields of MHCConfig whose flag Megatron has from 0.20 on: of the same type and meaning."""


def is_on(settings: Any) -> bool:
    """Whether Megatron's own streams are on, in a TransformerConfig or parsed arguments."""
    return any(is_set(name, 0)(settings) for name in SWITCHES)


def on_command_line(flag: str) -> bool:
    """Whether this process was started with the flag, whatever value a parser gives without it."""
    return any(word.split("=")[0] == flag for word in sys.argv[1:])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_given(name: str) -> Callable[[Any], bool]:
    """Whether a native setting stands on the command line, or has another value than by default."""

    def is_given(settings: Any) -> bool:
        from megatron.core.transformer import TransformerConfig

        defaults = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
        given = is_set(name, defaults.get(name))(settings)
        return given or on_command_line(_flag(name))

    return is_given


NATIVE_CONFLICTS = (
    *(
        Conflict(
            flag,
            is_set(name, 0),
            "Megatron's own residual streams are on beside --mhc; drop one of the two flags",
        )
        for name, flag in SWITCHES.items()
    ),
    *(
        Conflict(
            _flag(name),
            _is_given(name),
            f"it sets Megatron's own mHC up and not --mhc; use {ours}",
        )
        for name, ours in OURS.items()
    ),
    Conflict(
        "--recompute-modules mhc",
        lambda settings: "mhc" in (getattr(settings, "recompute_modules", None) or ()),
        "it recomputes Megatron's own mHC; take mhc off the list, and use --mhc-recompute",
    ),
)
"""What belongs to native mHC, beside ours."""


def shared_conflicts(mhc: MHCConfig) -> tuple[Conflict, ...]:
    """A shared setting that is native mHC's alone: it was set, and not to what ours says.

    Args:
        mhc: ours. Flags set both; a library's TransformerConfig knows nothing of it.
    """
    return tuple(
        Conflict(
            f"mhc_{name}",
            is_set(f"mhc_{name}", getattr(MHCConfig, name), getattr(mhc, name)),
            f"it sets Megatron's own mHC up; leave it out, and give MHCConfig {name}",
        )
        for name in SHARED
    )
