"""Calls of Python functions and of what they call in C, under cProfile."""

import cProfile
import pstats
from collections.abc import Callable, Iterator
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


def calls_of_others(profile: cProfile.Profile) -> int:
    """How often our functions call Python functions of others: PyTorch's, Megatron's, Python's."""
    stand_ins = Path(__file__).parent
    return _from_ours(
        profile, lambda file, _: not is_ours(file) and not Path(file).is_relative_to(stand_ins)
    )


def allocations(profile: cProfile.Profile, *names: str) -> int:
    """Tensors that our functions make by these functions, counted with `builtins`."""
    return _from_ours(profile, lambda _, name: any(one in name for one in names))


def _from_ours(profile: cProfile.Profile, is_counted: Callable[[str, str], bool]) -> int:
    """Calls that our functions make of those that count, by file and name."""
    return sum(
        calls[0]
        for (called, _, name), (*_, callers) in pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
        if is_counted(called, name)
        for (file, _, _), calls in callers.items()
        if is_ours(file)
    )
