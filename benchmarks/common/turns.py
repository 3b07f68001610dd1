"""Steps of several models in turn: what one costs beside another, whatever the clock does."""

import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Ratio(NamedTuple):
    """A model's steps over another's of the same rounds: median, a tenth and nine tenths."""

    median: float
    low: float
    high: float


def in_turn[T](steps: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each step returns, by name: one of each a round, so that a drift meets them all."""
    found: dict[str, list[T]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(step())
    return found


def ratio(times: list[float], beside: list[float]) -> Ratio:
    """Of two lists with a time for each round.

    Raises:
        ValueError: they have not equally many.
    """
    each = sorted(a / b for a, b in zip(times, beside, strict=True))
    tenth = len(each) // 10
    return Ratio(statistics.median(each), each[tenth], each[-1 - tenth])
