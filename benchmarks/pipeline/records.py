"""A step under PyTorch's profiler: what each stream did, what of it ran beside compute."""

import gzip
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import plotting
from benchmarks.common.spans import Span, together, union
from benchmarks.pipeline.emulated import EmulatedStage
from benchmarks.pipeline.neighbours import Pace
from benchmarks.pipeline.stage import file_name
from megatron_mhc.pipeline.state import state_of

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""The kinds of a trace's events that are work of the GPU."""
Event = dict[str, Any]
Lanes = dict[str, list[tuple[float, float, str]]]
"""By stream: begin and end in microseconds, and what ran."""


def profile(stage: EmulatedStage, order: str, pace: Pace, out: Path) -> dict[str, Any]:
    """A step as `record` has it: of up to three, the first with a combine beside compute.

    Raises:
        AssertionError: overlap was asked for, and none of three steps had one.
    """
    for _ in range(3):  # a GPU that others use too need not run two kernels at once
        result = record(stage, order, pace, out)
        if order == "stock order" or result["combines_beside_compute"]:
            return result
    raise AssertionError("no combine ran beside the compute stream")


def record(stage: EmulatedStage, order: str, pace: Pace, out: Path) -> dict[str, Any]:
    """One step under the profiler: spans by lane, what they say, and a chrome trace in `out`."""
    stage.choose(order, pace)
    for _ in range(2):
        stage.step()
    torch.cuda.synchronize()
    streams = streams_of(stage)
    path = out / f"{file_name(order)}.json"
    spans = lanes_of(traced_step(stage, streams, path), list(streams))
    result = summary(spans)
    check_priorities(stage, spans, result)
    print(
        f"profiled, {order}: links busy {result['link_ms']:.1f} ms, of that"
        f" {result['exposed_ms']:.2f} ms without a compute kernel; priority streams"
        f" {result['priority_ms']:.2f} ms in {result['priority_kernels']} kernels, of that"
        f" {result['priority_beside_compute_ms']:.2f} ms beside compute;"
        f" {result['combines_beside_compute']} of {result['combines']} combines beside compute"
    )
    return result


def streams_of(stage: EmulatedStage) -> dict[str, Any]:
    """The streams that a step runs on, by lane: compute, priority ones, links."""
    lanes = {"compute": torch.cuda.current_stream()}
    side_streams = state_of(stage.model).side_streams
    if side_streams is not None:
        lanes |= {f"priority {i}": stream for i, stream in enumerate(side_streams._streams)}
    for name in ("from_prev", "to_next", "from_next", "to_prev"):
        lanes[f"link {name}"] = getattr(stage.neighbours, name).stream
    return lanes


def traced_step(stage: EmulatedStage, streams: dict[str, Any], path: Path) -> list[Event]:
    """The events of a step, behind a mark on each stream; the GPU's go to PATH.gz."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as records:
        # a mark on each stream, one after the other, says which number the records give it
        for stream in streams.values():
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1000)
            torch.cuda.synchronize()
        stage.step()
        torch.cuda.synchronize()
    records.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    path.unlink()
    device = [e for e in events if e.get("cat") in DEVICE or e.get("ph") == "M"]
    with gzip.open(f"{path}.gz", "wt") as file:
        json.dump({"traceEvents": device}, file)
    return events


def lanes_of(events: list[Event], lanes: list[str]) -> Lanes:
    """What ran on each lane behind the marks, of which there is one a lane, in this order."""
    kept = [event for event in events if event.get("cat") in DEVICE]
    work = sorted(kept, key=lambda event: float(event["ts"]))
    marks = [event for event in work if "spin_kernel" in event["name"]][: len(lanes)]
    number = {e["args"]["stream"]: name for name, e in zip(lanes, marks, strict=True)}
    assert len(number) == len(lanes), f"two lanes on one stream: {number}"
    start = float(marks[-1]["ts"]) + float(marks[-1]["dur"])
    launched_by = operations(events)
    spans: Lanes = {name: [] for name in lanes}
    for event in work:
        name, begin = number.get(event["args"]["stream"]), float(event["ts"])
        if name is not None and begin > start:
            operation = launched_by.get(event["args"].get("correlation"), "")
            label = f"{operation} {event['name']}"
            spans[name].append((begin, begin + float(event["dur"]), label))
    return spans


def operations(events: list[Event]) -> dict[int, str]:
    """Which of mHC's operations launched a kernel, by the correlation id of its launch."""
    ranges = [
        (event["tid"], float(event["ts"]), float(event["ts"]) + float(event["dur"]), event["name"])
        for event in events
        if event.get("cat") == "cpu_op" and event["name"].startswith("megatron_mhc::")
    ]
    launches = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    return {
        launch["args"]["correlation"]: name
        for launch in launches
        for thread, begin, end, name in ranges
        if launch["tid"] == thread and begin <= float(launch["ts"]) <= end
    }


def summary(lanes: Lanes) -> dict[str, Any]:
    """Milliseconds of links and priority streams, alone and beside compute; and the spans."""

    def of(prefix: str, word: str = "") -> list[Span]:
        return [
            (begin, end)
            for lane, found in lanes.items()
            if lane.startswith(prefix)
            for begin, end, name in found
            if word in name
        ]

    compute, link, priority = of("compute"), of("link"), of("priority")
    busy = sum(end - begin for begin, end in union(link))
    combines = of("priority", "megatron_mhc::combine")
    return {
        "link_ms": busy / 1e3,
        "exposed_ms": (busy - together(link, compute)) / 1e3,
        "priority_kernels": len(priority),
        "combines": len(combines),
        "combines_beside_compute": sum(together([span], compute) > 0 for span in combines),
        "priority_ms": sum(end - begin for begin, end in union(priority)) / 1e3,
        "priority_beside_compute_ms": together(priority, compute) / 1e3,
        "spans": lanes,
    }


def check_priorities(stage: EmulatedStage, lanes: Lanes, result: dict[str, Any]) -> None:
    """With overlap, the stage's last combine runs on streams that go first, and only there.

    Raises:
        AssertionError: it does not.
    """
    side_streams = state_of(stage.model).side_streams
    if side_streams is None:
        return
    priorities = {stream.priority for stream in side_streams._streams}
    assert max(priorities) < torch.cuda.current_stream().priority, f"priorities {priorities}"
    names = sorted({name for _, _, name in lanes["priority 0"]})
    assert result["combines"], f"no combine ran on a high-priority stream; there ran {names}"
    elsewhere = [name for _, _, name in lanes["compute"] if "::combine " in name]
    assert not elsewhere, "the stage's last combine ran on the compute stream too"


def draw(profiles: dict[str, Any], path: Path) -> None:
    """The timelines of the profiled steps, one under the other."""
    colours = {"compute": "tab:blue", "priority": "tab:red", "link": "tab:green"}
    figure, axes = plotting.pyplot().subplots(
        len(profiles), figsize=(16, 4 * len(profiles)), sharex=True, squeeze=False
    )
    for axis, (order, result) in zip(axes[:, 0], profiles.items(), strict=True):
        lanes = result["spans"]
        start = min(begin for found in lanes.values() for begin, _, _ in found)
        for row, (lane, found) in enumerate(reversed(lanes.items())):
            bars = [((begin - start) / 1e3, (end - begin) / 1e3) for begin, end, _ in found]
            axis.broken_barh(bars, (row - 0.4, 0.8), color=colours[lane.split()[0]])
        axis.set_yticks(range(len(lanes)), list(reversed(lanes)))
        axis.set_title(f"{order}: one step")
    axis.set_xlabel("ms")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
