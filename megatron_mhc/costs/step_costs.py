"""What mHC adds to a step's time: its kernels, its launches, its messages.

Kernels by their measured passes over memory, the host by its measured time a site, messages by
their bytes, put together by `schedule_model`. The reports behind the constants are named beside
them.
"""

from collections.abc import Callable
from typing import NamedTuple

from .schedule_model import Work, step_seconds


class Card(NamedTuple):
    """A GPU's rates.

    Attributes:
        tflops: dense bf16, from its data sheet.
        copy: TB/s that a device-to-device copy moves; measured on an H100 (3.0), 0.9 of the data
            sheet on others.
    """

    tflops: float
    copy: float


CARDS = {
    "A100": Card(312, 1.83),
    "H100": Card(989, 3.0),
    "H200": Card(989, 4.3),
    "B200": Card(2250, 7.2),
}
PASSES = Work(16.2, 48.5 - 16.2)
"""Of a site's kernels, forward and backward: times T*C bf16 elements at the copy's speed. An H100,
T 8192, C 4096 (benchmarks/results/2026-11-26-projection.md)."""
LEAST = Work(61e-6, 144e-6)
"""Seconds that they take however few the tokens (T 1024, the same report)."""
HOST = Work(1331e-6, 1168e-6)
"""The host's seconds for an ordinary sublayer with Transformer Engine
(benchmarks/results/2026-11-27-host.md); Megatron's graphs of layers spare them."""
HOST_OF_MHC = Work(210e-6, 491e-6)
"""What a site adds to them."""
LATENCY = 20e-6
"""Seconds of a message without bytes: an assumption."""
GIGA = 1e9


class Run(NamedTuple):
    """What the time of a step follows from, a GPU.

    Attributes:
        tokens: of a microbatch, on this GPU.
        width: C. n: streams.
        sublayers: of each stage, for each of its model chunks.
        flops: an ordinary sublayer's for a microbatch, forward; last: the logits' beside them.
        backward: a backward's FLOPs over its forward's (2; 3 with full recompute).
        microbatches: of a step.
        group: see `schedule_model.order`.
        element: bytes of a stream's element.
        hosted: whether the host launches every kernel (no CUDA graphs).
    """

    tokens: int
    width: int
    n: int
    sublayers: list[list[int]]
    flops: float
    last: float
    backward: float
    microbatches: int
    group: int
    element: int
    hosted: bool


class Estimate(NamedTuple):
    """Seconds of a step: ordinary; with mHC's kernels; with its launches too; with its messages
    too; then with overlap, and with two microbatches in flight (None with virtual stages).

    message: seconds of a message of the ordinary model and of mHC's.
    """

    ordinary: float
    kernels: float
    launches: float
    messages: float
    overlap: float
    in_flight: float | None
    message: tuple[float, float]


def site(card: Card, tokens: int, width: int, element: int = 2) -> Work:
    """Seconds of a site's kernels."""
    one = tokens * width * element / (card.copy * 1e12)
    return Work(*(max(least, passes * one) for least, passes in zip(LEAST, PASSES, strict=True)))


def _work(run: Run, rate: float, kernels: Work, host: Work) -> list[list[Work]]:
    """Of each stage and chunk: what takes longer, the GPU or the host."""
    found = []
    for stage, chunks in enumerate(run.sublayers):
        row = []
        for chunk, count in enumerate(chunks):
            is_last = stage == len(run.sublayers) - 1 and chunk == len(chunks) - 1
            flops = (count * run.flops + is_last * run.last) / rate
            row.append(
                Work(
                    max(flops + count * kernels.forward, count * host.forward),
                    max(run.backward * flops + count * kernels.backward, count * host.backward),
                )
            )
        found.append(row)
    return found


def estimate(run: Run, card: Card, link: float, mfu: float, ordinary: float | None) -> Estimate:
    """The time of a step.

    Args:
        run: what it follows from.
        card: of each GPU.
        link: GB/s between neighbouring stages.
        mfu: the share of the card's rate at which the ordinary model's FLOPs are done, its own
            bubbles and messages left out.
        ordinary: the ordinary model's step as measured, in seconds, or None. Then `mfu` follows
            from it.
    """
    none = Work(0.0, 0.0)
    host = HOST if run.hosted else none
    both = Work(*(a + b for a, b in zip(host, HOST_OF_MHC, strict=True))) if run.hosted else none
    size = run.tokens * run.width * run.element / (link * GIGA)
    message = LATENCY + size, LATENCY + run.n * size
    if len(run.sublayers) == 1 and len(run.sublayers[0]) == 1:
        message = 0.0, 0.0
    kernels = site(card, run.tokens, run.width, run.element)

    def seconds(rate: float, own: Work, launches: Work, messages: float, ahead: int = 0) -> float:
        """`ahead`: 0 for stock order, else the microbatches in flight of the overlap."""
        return step_seconds(
            _work(run, rate, own, launches),
            run.microbatches,
            messages,
            overlapped=ahead > 0,
            group=run.group,
            ahead=max(ahead, 1),
        )

    def at(rate: float) -> float:
        return seconds(rate, none, host, message[0])

    rate = mfu * card.tflops * 1e12
    if ordinary is not None:
        rate = rate_of(at, ordinary, card)
    chunks = len(run.sublayers[0])
    return Estimate(
        at(rate),
        seconds(rate, kernels, host, message[0]),
        seconds(rate, kernels, both, message[0]),
        seconds(rate, kernels, both, message[1]),
        seconds(rate, kernels, both, message[1], 1),
        seconds(rate, kernels, both, message[1], 2) if chunks == 1 else None,
        message,
    )


def rate_of(at: Callable[[float], float], ordinary: float, card: Card) -> float:
    """The rate, in FLOP/s, with which `at(rate)` is the ordinary step as measured.

    Raises:
        ValueError: no rate up to the card's is slow or fast enough.
    """
    slow, fast = 1e9, card.tflops * 1e12
    if at(fast) > ordinary:
        raise ValueError(
            f"a step of {ordinary * 1e3:.0f} ms is faster than the model allows: at the card's full"
            f" rate it takes {at(fast) * 1e3:.0f} ms. Give the card and link of that measurement"
            " (--card, --link), or another --step-ms"
        )
    for _ in range(60):
        middle = (slow + fast) / 2
        slow, fast = (middle, fast) if at(middle) > ordinary else (slow, middle)
    return slow
