"""A setting of Megatron's that mHC cannot work with: what `compatibility` and `native_mhc` list."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conflict:
    """A setting that mHC refuses.

    Attributes:
        flag: what the user gave.
        given: from the settings (a TransformerConfig or Megatron's parsed arguments), whether.
        advice: why not, and what to do.
    """

    flag: str
    given: Callable[[Any], bool]
    advice: str


def is_set(name: str, *off: Any) -> Callable[[Any], bool]:
    """From the settings, whether this one is given: not None, not False and none of `off`."""
    return lambda settings: getattr(settings, name, None) not in (None, False, *off)
