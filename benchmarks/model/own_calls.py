"""Calls of Python functions and of what they call in C, under cProfile."""

import cProfile
import pstats
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import megatron_mhc


@contextmanager
def profiled(builtins: bool = False) -> Iterator[cProfile.Profile]:
    """Inside, calls are counted and timed; C functions' time is their caller's without `builtins`.

    Backwards run on this thread, where they are seen.
    """
    profile = cProfile.Profile(builtins=builtins)
    with torch.autograd.set_multithreading_enabled(False):
        profile.enable()
        try:
            yield profile
        finally:
            profile.disable()


def is_ours(file: str) -> str:
    """The place of one of our files in its package; empty for another file."""
    roots = (Path(megatron_mhc.__file__).parent, Path(megatron_mhc.kernels.__file__).parent)
    root = next((root for root in roots if Path(file).is_relative_to(root)), None)
    return "" if root is None else f"{root.name}/{Path(file).relative_to(root)}"


def ours(profile: cProfile.Profile) -> Iterator[tuple[str, int, float]]:
    """Of each of our functions: where it is, how often it ran, the seconds in it alone."""
    for (file, line, name), row in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if place := is_ours(file):
            yield f"{place}:{line} {name}", row[1], row[2]


def allocations(profile: cProfile.Profile) -> int:
    """Tensors that our functions make, counted with `builtins`."""
    return sum(
        calls[0]
        for (_, _, name), (*_, callers) in pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
        if "new_empty" in name or "empty_like" in name or "torch.empty" in name
        for (file, _, _), calls in callers.items()
        if is_ours(file)
    )
