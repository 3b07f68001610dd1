"""Megatron on a CPU: the way in and out; `torch_cuda` changes torch, `changes` Megatron."""

import contextlib
import logging
from collections.abc import Iterator

from megatron_mhc.patches.registry import registry

from .changes import CPU_PATCHES, SHIPPED_HELPERS
from .torch_cuda import cuda_is_cpu

__all__ = ["CPU_PATCHES", "SHIPPED_HELPERS", "active", "cpu_stand_in", "enter", "leave"]


def _is_news(record: logging.LogRecord) -> bool:
    # Megatron warns at each dropout: with one generator for both, it can only be so
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


@contextlib.contextmanager
def _without_generator_warning() -> Iterator[None]:
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(_is_news)
    try:
        yield
    finally:
        logger.removeFilter(_is_news)


_inside: contextlib.ExitStack | None = None


def active() -> bool:
    """Whether the CPU stands in for CUDA."""
    return _inside is not None


def enter() -> None:
    """Let the CPU stand in for CUDA, until `leave`; inside already, nothing changes."""
    global _inside
    if _inside is not None:
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(cuda_is_cpu())
        stack.enter_context(_without_generator_warning())
        statuses = registry.status(*CPU_PATCHES)
        # what somebody else applied is theirs to undo
        mine = [status.patch for status in statuses if status.state != "applied"]
        registry.apply(*mine)
        for patch in mine:
            stack.callback(registry.undo, patch.id)
        _inside = stack.pop_all()


def leave() -> None:
    """Put everything back; outside already, nothing changes."""
    global _inside
    if _inside is not None:
        stack, _inside = _inside, None
        stack.close()


@contextlib.contextmanager
def cpu_stand_in() -> Iterator[None]:
    """The CPU stands in for CUDA inside; within another one, the outer one ends it."""
    if active():
        yield
        return
    enter()
    try:
        yield
    finally:
        leave()
