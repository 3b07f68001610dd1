"""How long a site's kernels take, as measured: passes over memory by card, dtype and streams.

A pass moves T*C elements of the streams at the speed of a device-to-device copy. All at T 8192,
C 4096, 20 Sinkhorn iterations.
"""

from collections.abc import Mapping
from typing import NamedTuple

from .schedule_model import Work

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of a stream's element."""


class Kind(NamedTuple):
    """Of a site: dtype and number n of its streams, and whether it is delayed (`deepseek_v4_1`)."""

    dtype: str
    n: int
    delayed: bool = False


COMMON = Kind("bf16", 4)


class Card(NamedTuple):
    """A GPU's rates.

    Attributes:
        tflops: dense bf16, from its data sheet.
        copy: TB/s that a device-to-device copy moves; measured on an H100 (3.0) and an H200 (4.24),
            0.9 of the data sheet on others.
        passes: of a site forward and backward, of the kinds that were timed on it.
    """

    tflops: float
    copy: float
    passes: Mapping[Kind, Work] = {}


# benchmarks/results/2026-11-27-kernels.md and 2026-11-28-steps.md
_H100 = {
    Kind("bf16", 4): Work(16.1, 31.1),
    Kind("bf16", 8): Work(74.9, 203.9),
    Kind("bf16", 4, delayed=True): Work(13.4, 26.0),
}
# benchmarks/results/2026-11-28-sites.md
_H200 = {
    Kind("bf16", 1): Work(6.8, 16.4),
    Kind("bf16", 2): Work(9.9, 21.4),
    Kind("bf16", 4): Work(19.1, 37.7),
    Kind("fp16", 2): Work(16.7, 28.3),
    Kind("fp16", 4): Work(37.8, 63.7),
    Kind("fp32", 2): Work(13.5, 20.1),
    Kind("fp32", 4): Work(29.7, 43.9),
    Kind("bf16", 1, delayed=True): Work(6.8, 13.6),
    Kind("bf16", 2, delayed=True): Work(9.5, 18.1),
    Kind("bf16", 4, delayed=True): Work(16.5, 32.6),
    Kind("fp16", 2, delayed=True): Work(18.6, 24.6),
    Kind("fp16", 4, delayed=True): Work(36.4, 66.4),
    Kind("fp32", 2, delayed=True): Work(13.8, 17.3),
    Kind("fp32", 4, delayed=True): Work(27.0, 39.2),
}
CARDS = {
    "A100": Card(312, 1.83),
    "H100": Card(989, 3.0, _H100),
    "H200": Card(989, 4.24, _H200),
    "B200": Card(2250, 7.2),
}
LEAST = Work(61e-6, 144e-6)
"""Seconds that a site's kernels take however few the tokens: n 4, T 1024, C 4096, an H100
(benchmarks/results/2026-11-26-projection.md)."""


def _scaled(work: Work, by: Work, over: Work) -> Work:
    return Work(*(a * b / c for a, b, c in zip(work, by, over, strict=True)))


def passes(card: Card, kind: Kind) -> Work:
    """Of a site's kernels, forward and backward.

    As timed on this card, else on an H100, else on an H200. Else in bf16 by n's least traffic (13,
    20, 34 and 62 passes for 1, 2, 4 and 8 streams), in other dtypes by the ratio at n 4, and of a
    delayed site by its ratio there.
    """
    timed = {**_H200, **_H100, **card.passes}
    if kind in timed:
        return timed[kind]
    if kind.delayed:
        ratio = (_H200[COMMON._replace(delayed=True)], _H200[COMMON])
        return _scaled(passes(card, kind._replace(delayed=False)), *ratio)
    if kind.dtype != "bf16":
        ratio = (_H200[kind._replace(n=4)], _H200[COMMON])
        return _scaled(passes(card, kind._replace(dtype="bf16")), *ratio)
    return Work(*(count * (6 + 7 * kind.n) / 34 for count in timed[COMMON]))


def site(card: Card, tokens: int, width: int, kind: Kind = COMMON) -> Work:
    """Seconds of a site's kernels, forward and backward."""
    one = tokens * width * ELEMENT[kind.dtype] / (card.copy * 1e12)
    counts = passes(card, kind)
    return Work(*(max(least, count * one) for least, count in zip(LEAST, counts, strict=True)))
