"""How long a site's kernels take, as measured: passes over memory by card, dtype and streams.

A pass moves T*C elements of the streams at the speed of a device-to-device copy. All at T 8192,
C 4096, 20 Sinkhorn iterations, the paper's convention.
"""

from collections.abc import Mapping
from typing import NamedTuple

from .schedule_model import Work

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of a stream's element."""


class Card(NamedTuple):
    """A GPU's rates.

    Attributes:
        tflops: dense bf16, from its data sheet.
        copy: TB/s that a device-to-device copy moves; measured on an H100 (3.0) and an H200 (4.24),
            0.9 of the data sheet on others.
        passes: forward and backward of a site by dtype and n, where they were timed on it.
    """

    tflops: float
    copy: float
    passes: Mapping[tuple[str, int], Work] = {}


# benchmarks/results/2026-11-27-kernels.md and 2026-11-28-steps.md
_H100 = {("bf16", 4): Work(16.1, 31.1), ("bf16", 8): Work(74.9, 203.9)}
# benchmarks/results/2026-11-28-sites.md
_H200 = {
    ("bf16", 1): Work(6.8, 16.4),
    ("bf16", 2): Work(9.9, 21.4),
    ("bf16", 4): Work(19.1, 37.7),
    ("fp16", 2): Work(16.7, 28.3),
    ("fp16", 4): Work(37.8, 63.7),
    ("fp32", 2): Work(13.5, 20.1),
    ("fp32", 4): Work(29.7, 43.9),
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


def passes(card: Card, dtype: str, n: int) -> Work:
    """Of a site's kernels, forward and backward.

    As timed on this card, else on an H100, else on an H200; else in bf16 by n's least traffic
    (13, 20, 34 and 62 passes for 1, 2, 4 and 8 streams), and in other dtypes by n 4's ratio.
    """
    timed = {**_H200, **_H100, **card.passes}
    if (dtype, n) in timed:
        return timed[dtype, n]
    if dtype != "bf16":
        of_bf16 = {**_H100, **_H200}["bf16", 4]
        return _scaled(passes(card, "bf16", n), timed[dtype, 4], of_bf16)
    return Work(*(count * (6 + 7 * n) / 34 for count in timed["bf16", 4]))


def site(card: Card, tokens: int, width: int, n: int = 4, dtype: str = "bf16") -> Work:
    """Seconds of a site's kernels, forward and backward."""
    one = tokens * width * ELEMENT[dtype] / (card.copy * 1e12)
    counts = passes(card, dtype, n)
    return Work(*(max(least, count * one) for least, count in zip(LEAST, counts, strict=True)))
