"""The rules of the reports: what broke, what is a spike, how many tokens a loss takes."""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

WINDOW = 10
"""Steps in a mean of the loss."""
SURGE = 0.5
"""Nats that the mean loss may rise above its minimum before a run counts as broken."""
SPIKE_WINDOW = 50
"""Steps before a step, with whose losses it is compared."""
SPIKE_DEVIATIONS = 6
"""How many of their standard deviations above their median a spike begins."""
SPIKE_NATS = 0.1
"""And how many nats at the least."""

Points = Sequence[Sequence[float]]
"""(x, y), x rising."""


def means(values: Sequence[float]) -> list[float]:
    """Means of WINDOW values, one window after another; of what there is, if that is less."""
    edges = range(0, max(len(values), WINDOW) + 1, WINDOW)
    parts = [values[a:b] for a, b in pairwise(edges)]
    return [sum(part) / len(part) for part in parts if part]


def surge(losses: Sequence[float]) -> float:
    """The largest rise of the mean loss above its minimum so far, nats."""
    lowest, largest = math.inf, 0.0
    for mean in means(losses):
        lowest = min(lowest, mean)
        largest = max(largest, mean - lowest)
    return largest


def dead_from(steps: Sequence[int], norms: Sequence[float]) -> int | None:
    """The step from which to the end all gradients are exactly 0, if there is one."""
    dead = None
    for step, norm in zip(steps, norms, strict=True):
        dead = (dead or step) if norm == 0 else None
    return dead


def outcome(losses: Sequence[float], norms: Sequence[float], state: str) -> str:
    """finished, stopped, failed, or broke and why."""
    if state == "broke" or not all(math.isfinite(loss) for loss in losses):
        return "broke: no number"
    steps = range(1, len(norms) + 1)
    if (dead := dead_from(steps, norms)) is not None:
        return f"broke: gradients 0 from step {dead}"
    return "broke: the loss rose" if surge(losses) > SURGE else state


def spikes(losses: Sequence[float], warm_up: int) -> list[int]:
    """The steps, from 1, at which the loss spikes.

    A spike begins at a step whose loss is above the median of the SPIKE_WINDOW losses before by
    more than SPIKE_DEVIATIONS of their standard deviations (1.4826 times the median distance from
    the median) and more than SPIKE_NATS. It lasts until a loss is no higher than half of that
    bound above the median that it began at; meanwhile no other begins. Steps of the warm-up, and
    the first SPIKE_WINDOW, have none.
    """
    found, ends_below = [], None
    for index in range(max(warm_up, SPIKE_WINDOW), len(losses)):
        loss = losses[index]
        if ends_below is not None:
            ends_below = ends_below if not loss <= ends_below else None
            continue
        before = losses[index - SPIKE_WINDOW : index]
        median = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in before)
        bound = max(SPIKE_DEVIATIONS * deviation, SPIKE_NATS)
        if not loss <= median + bound:
            found.append(index + 1)
            ends_below = median + bound / 2
    return found


def value_at(points: Points, x: float) -> float | None:
    """y at x, straight between the points; None outside of them."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def reached(points: Points, level: float) -> float | None:
    """The first x at which y is no higher than a level, straight between the points; else None."""
    last = None
    for x, y in points:
        if y <= level:
            if last is None or last[1] == y:
                return x
            x0, y0 = last
            return x0 + (x - x0) * (y0 - level) / (y0 - y)
        last = (x, y)
    return None


def tokens_for(short: Sequence[float], long: Sequence[float], level: float) -> float | None:
    """Tokens that a model needs for a loss, of two whole runs of different lengths.

    Each run's rate has decayed to its end, so that both ends are fair; the loss is taken as
    straight in the logarithm of tokens, between the two ends and beyond.

    Args:
        short, long: (tokens, last loss) of each.
        level: the loss.

    Returns:
        Tokens; None where the longer run is no better than the shorter one.
    """
    slope = (short[1] - long[1]) / math.log(long[0] / short[0])
    return long[0] * math.exp((long[1] - level) / slope) if slope > 0 else None


def loss_after(short: Sequence[float], long: Sequence[float], tokens: float) -> float:
    """The loss of a whole run of so many tokens, by the same rule as `tokens_for`."""
    slope = (short[1] - long[1]) / math.log(long[0] / short[0])
    return long[1] - slope * math.log(tokens / long[0])


def band(curves: Sequence[Points]) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) over curves, at every x that all of them have."""
    found = [{point[0]: point[1] for point in curve} for curve in curves]
    common = sorted(set.intersection(*(set(curve) for curve in found))) if found else []
    rows = [(x, [curve[x] for curve in found]) for x in common]
    return [(x, sum(ys) / len(ys), min(ys), max(ys)) for x, ys in rows]
