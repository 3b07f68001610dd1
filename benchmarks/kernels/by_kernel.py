"""The CUDA kernels that a site launches, and the time of each, by torch.profiler."""

import statistics
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def captured(step: Callable[[], object]) -> Callable[[], object] | None:
    """A replay of step() as a CUDA graph, or None where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            step()
        return graph.replay
    except Exception:
        torch.cuda.synchronize()
        return None


def kernel_times(step: Callable[[int], object], sets: int, runs: int = 20) -> dict[str, float]:
    """Median time in us of each kernel that step(i % sets) launches, in the order of launching.

    Args:
        step: launches the same kernels in the same order each time, plainly or as a graph.
        sets: sets of buffers to rotate through.

    Returns:
        Name -> us, the sum over its launches in one step; "between kernels" is what is left of
        the time from the first kernel's start to the last one's end.

    Raises:
        RuntimeError: the profiler saw no kernel, or two steps launched different ones.
    """
    for i in range(sets):
        step(i)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for i in range(runs):
            step(i % sets)
        torch.cuda.synchronize()
    return medians(
        sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ),
        runs,
    )


def medians(kernels: list[tuple[float, float, str]], runs: int) -> dict[str, float]:
    """What `kernel_times` returns, from (start, end, name) of all kernels of `runs` equal steps."""
    count = len(kernels) // runs
    steps = [kernels[first : first + count] for first in range(0, count * runs, max(count, 1))]
    if len({tuple(name for _, _, name in step) for step in steps}) != 1 or len(kernels) % runs:
        raise RuntimeError(f"{len(kernels)} kernels in {runs} steps: not the same ones each time")
    taken = defaultdict(list)
    for step in steps:
        times: dict[str, float] = defaultdict(float)
        for start, end, name in step:
            times[name] += end - start
        times["between kernels"] = step[-1][1] - step[0][0] - sum(times.values())
        for name, time in times.items():
            taken[name].append(time)
    return {name: statistics.median(times) for name, times in taken.items()}


def longer_than(other: dict[str, float], own: dict[str, float]) -> dict[str, float]:
    """How much longer each kernel takes in `own` than in `other`, of which one may not have it; the
    largest difference first."""
    longer = {name: own.get(name, 0.0) - other.get(name, 0.0) for name in own | other}
    return dict(sorted(longer.items(), key=lambda item: -abs(item[1])))
