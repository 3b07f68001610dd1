"""What mHC adds to a step's time: its kernels, its launches, its messages.

Kernels by `kernel_passes`, the host by its measured time a site, messages by their bytes, put
together by `schedule_model`. The reports behind the constants are named beside them.
"""

from collections.abc import Callable
from typing import NamedTuple

from .kernel_passes import ELEMENT, Card, Kind, site
from .schedule_model import Work, step_seconds

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
        width: C. kind: of its sites.
        sublayers: of each stage, for each of its model chunks.
        flops: an ordinary sublayer's for a microbatch, forward; last: the logits' beside them.
        backward: a backward's FLOPs over its forward's (2; 3 with full recompute).
        microbatches: of a step.
        group: see `schedule_model.order`.
        hosted: whether the host launches every kernel (no CUDA graphs).
    """

    tokens: int
    width: int
    kind: Kind
    sublayers: list[list[int]]
    flops: float
    last: float
    backward: float
    microbatches: int
    group: int
    hosted: bool

    @property
    def bytes(self) -> int:
        """Of one stream of a microbatch."""
        return self.tokens * self.width * ELEMENT[self.kind.dtype]


class Estimate(NamedTuple):
    """Seconds of a step: ordinary; with mHC's kernels; with its launches too; with its messages
    too; then with overlap, and with two microbatches in flight (None with virtual stages).

    message: seconds of a message of the ordinary model and of mHC's.
    mfu: the share of the card's rate at which a stage does the ordinary model's FLOPs.
    """

    ordinary: float
    kernels: float
    launches: float
    messages: float
    overlap: float
    in_flight: float | None
    message: tuple[float, float]
    mfu: float


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


def estimate(
    run: Run, card: Card, link: float, mfu: float | None, ordinary: float | None = None
) -> Estimate:
    """The time of a step.

    Args:
        run: what it follows from.
        card: of each GPU.
        link: GB/s between neighbouring stages.
        mfu: the share of the card's rate at which the ordinary model's FLOPs are done, its own
            bubbles and messages left out; None where it is to follow from `ordinary`.
        ordinary: the ordinary model's step as measured, in seconds, or None. Beside an `mfu`, what
            it takes longer than the model says is what it stops for at its messages, in equal
            parts, whatever their bytes.

    Raises:
        ValueError: neither mfu nor ordinary is given, or nothing explains a step of that length.
    """
    none = Work(0.0, 0.0)
    host = HOST if run.hosted else none
    both = Work(*(a + b for a, b in zip(host, HOST_OF_MHC, strict=True))) if run.hosted else none
    size = run.bytes / (link * GIGA)
    has_messages = len(run.sublayers) > 1 or len(run.sublayers[0]) > 1
    kernels = site(card, run.tokens, run.width, run.kind)

    def seconds(
        rate: float, own: Work, launches: Work, message: float, ahead: int | None = None
    ) -> float:
        """`ahead`: the microbatches in flight of the overlap; None for stock order."""
        return step_seconds(
            _work(run, rate, own, launches),
            run.microbatches,
            message if has_messages else 0.0,
            overlapped=ahead is not None,
            group=run.group,
            ahead=ahead or 1,
        )

    def at(share: float, stop: float = LATENCY) -> float:
        return seconds(share * card.tflops * 1e12, none, host, stop + size)

    stop = LATENCY
    if mfu is None:
        if ordinary is None:
            raise ValueError("give an MFU, or the ordinary model's step as measured")
        mfu = mfu_of(at, ordinary)
    elif ordinary is not None:
        stop = stop_of(lambda stop: at(mfu, stop), ordinary, mfu)
    rate = mfu * card.tflops * 1e12
    message = (stop + size, stop + run.kind.n * size) if has_messages else (0.0, 0.0)
    has_two_in_flight = len(run.sublayers[0]) == 1
    return Estimate(
        at(mfu, stop),
        seconds(rate, kernels, host, message[0]),
        seconds(rate, kernels, both, message[0]),
        seconds(rate, kernels, both, message[1]),
        seconds(rate, kernels, both, message[1], 1),
        seconds(rate, kernels, both, message[1], 2) if has_two_in_flight else None,
        message,
        mfu,
    )


def _bisected(of: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where `of`, which grows from low to high, is `wanted`."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if of(middle) > wanted else (middle, high)
    return low


def mfu_of(at: Callable[[float], float], ordinary: float) -> float:
    """The share of the card's rate with which `at(share)` is the ordinary step as measured.

    Raises:
        ValueError: at the card's full rate it takes longer.
    """
    if at(1.0) > ordinary:
        raise ValueError(
            f"a step of {ordinary * 1e3:.0f} ms is faster than the model allows: at the card's full"
            f" rate it takes {at(1.0) * 1e3:.0f} ms. Give the card and link of that measurement"
            " (--card, --link), or another --step-ms"
        )
    return 1 / _bisected(lambda inverse: at(1 / inverse), ordinary, 1.0, 1e6)


def stop_of(at: Callable[[float], float], ordinary: float, mfu: float) -> float:
    """The seconds at each message, beside its bytes, with which `at(stop)` is the ordinary step as
    measured.

    Raises:
        ValueError: without any it takes longer; or no message is sent.
    """
    if not at(0.0) <= ordinary <= at(ordinary):
        raise ValueError(
            f"at {mfu:.1%} of the card's rate the ordinary step takes at least {at(0.0) * 1e3:.0f}"
            f" ms, and --step-ms says {ordinary * 1e3:.0f}. What a step takes longer can be its"
            " messages', if it has any; nothing makes it shorter. Give --step-ms without --mfu, or"
            " the --mfu of one stage alone"
        )
    return _bisected(at, ordinary, 0.0, ordinary)
