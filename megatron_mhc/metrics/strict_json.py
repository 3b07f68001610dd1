"""JSON as the standard has it: `null` stands for a number that is not finite.

Python writes bare NaN and Infinity, which no other reader takes.
"""

import json
import math
from collections.abc import Callable
from typing import Any


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same dicts and lists of changed values."""
    if isinstance(value, dict):
        return {key: _each(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_each(one, change) for one in value]
    return change(value)


def written(value: Any, indent: int | None = None) -> str:
    """The text of a value; `null` for each NaN and infinity."""

    def finite(one: Any) -> Any:
        return None if isinstance(one, float) and not math.isfinite(one) else one

    return json.dumps(_each(value, finite), allow_nan=False, indent=indent)


def read(text: str) -> Any:
    """The value of a text; NaN for each `null`.

    Raises:
        json.JSONDecodeError: it is no JSON.
    """
    return _each(json.loads(text), lambda one: math.nan if one is None else one)
