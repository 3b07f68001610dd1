"""Time on a GPU, by CUDA events on the current stream; and the host's, by the clock."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def events(count: int) -> list[Any]:
    """CUDA events that tell the time; made beforehand, so that a measurement makes none."""
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]


def elapsed_ms(step: Callable[[], object]) -> float:
    """Milliseconds of step(), which has ended when this returns."""
    begin, end = events(2)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def median_us(step: Callable[[int], object], sets: int, seconds: float = 0.25) -> float:
    """Median microseconds of step(i % sets), queued one behind the other for about `seconds`.

    Args:
        step: works on one of `sets` sets of buffers, so that none finds its inputs in the L2 cache.
    """
    for i in range(sets + 1):
        step(i % sets)
    torch.cuda.synchronize()
    begun = time.monotonic()
    step(0)
    torch.cuda.synchronize()
    count = max(10, min(200, int(seconds / max(time.monotonic() - begun, 1e-6))))
    pairs = [events(2) for _ in range(count)]
    for i, (begin, end) in enumerate(pairs):
        begin.record()
        step(i % sets)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) * 1e3


def host_us(step: Callable[[], object]) -> float:
    """Median microseconds in which the host queues step(); the GPU's queue never fills."""
    taken = []
    for _ in range(20):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begun)
    torch.cuda.synchronize()
    return statistics.median(taken) * 1e6
