"""Spans of time on a GPU, from a profiler's chrome trace: (begin, end) in microseconds."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

Span = tuple[float, float]


def union(spans: list[Span]) -> list[Span]:
    """The spans, joined where they touch."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def together(a: list[Span], b: list[Span]) -> float:
    """How long spans of both run at once."""
    return sum(
        max(0.0, min(end, other_end) - max(begin, other_begin))
        for begin, end in union(a)
        for other_begin, other_end in union(b)
    )


def kernels(trace: Path) -> Iterator[tuple[str, Span]]:
    """Name and span of every kernel in a chrome trace, which may be compressed.

    On the clock of the host where the trace has its offset, so that ranks can be laid side by side.

    Raises:
        EOFError, json.JSONDecodeError: its writer was ended before it was whole; it is empty.
    """
    with gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open() as file:
        read = json.load(file)
    offset = read.get("baseTimeNanoseconds", 0) / 1e3
    for event in read["traceEvents"]:
        if event.get("cat") == "kernel":
            begin = offset + float(event["ts"])
            yield event["name"], (begin, begin + float(event["dur"]))


def is_message(name: str) -> bool:
    """Whether a kernel is NCCL's send and receive: of pipeline stages, or of an all-to-all."""
    return "SendRecv" in name


def exposed(trace: Path) -> dict[str, float]:
    """Of NCCL's send and receive kernels in a chrome trace: milliseconds, and those alone.

    A receive's kernel also waits for its neighbour: bubbles are in both figures.
    """
    spans: dict[bool, list[Span]] = {True: [], False: []}
    for name, span in kernels(trace):
        if is_message(name) or "nccl" not in name.lower():
            spans[is_message(name)].append(span)
    message = sum(end - begin for begin, end in union(spans[True]))
    return {
        "p2p_ms": message / 1e3,
        "p2p_alone_ms": (message - together(spans[True], spans[False])) / 1e3,
    }
