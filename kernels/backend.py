"""Which implementation runs: "triton", "torch" (the reference) or "auto"."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch

Backend = Literal["auto", "triton", "torch"]
BACKENDS: tuple[str, ...] = get_args(Backend)
TRITON_STREAMS = (1, 2, 4, 8)
"""The numbers of streams that have Triton kernels."""

HAS_TRITON = importlib.util.find_spec("triton") is not None

# a plain global, as torch.compile guards on those: a change of it compiles anew
_default: str = "auto"


def check_backend(backend: str) -> None:
    """Raise ValueError unless backend is one of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Within this context, operations called without `backend=` use this one, on every thread.

    Raises:
        ValueError: unknown backend.
    """
    global _default
    check_backend(backend)
    before, _default = _default, backend
    try:
        yield
    finally:
        _default = before


def why_not_triton(
    num_streams: int, device: torch.device, dtype: torch.dtype | None = None
) -> str | None:
    """Why Triton cannot serve n streams (of this dtype) on this device; None when it can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if num_streams not in TRITON_STREAMS:
        served = ", ".join(map(str, TRITON_STREAMS))
        return f"there is no Triton kernel for {num_streams} streams (there is for {served})"
    if dtype == torch.float64:
        return "there is no Triton kernel for torch.float64 (the reference computes it)"
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"Triton needs a CUDA device and the tensors are on {device.type!r}"
    if device.index not in _cards:
        _cards[device.index] = _why_not_card(device)
    return _cards[device.index]


_cards: dict[int | None, str | None] = {}
"""The answers of `_why_not_card`, asked for at every operation. (torch.compile guards on a
dictionary, and looks through functools.cache with a warning.)"""


def _why_not_card(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device of type "cuda"; None where there is no such card
    to ask."""
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA's GPUs and this PyTorch is one for ROCm"
    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties(device)  # torch.compile knows this function
    if card.major < 8:
        return (
            f"the kernels need a GPU of compute capability 8.0 or higher and the {card.name} has"
            f" {card.major}.{card.minor}"
        )
    return None


def resolve(
    backend: str | None,
    num_streams: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Literal["triton", "torch"]:
    """The implementation to run: `backend`, else the one of `use_backend`, else "auto".

    "auto" is Triton where it can serve these streams, in this dtype, on a CUDA device, and the
    reference elsewhere (on a CPU too under Triton's interpreter, which is for tests alone).

    Raises:
        ValueError: unknown backend, or "triton" where Triton cannot run (says why and what to do).
    """
    backend = _default if backend is None else backend
    check_backend(backend)
    if backend == "torch":
        return "torch"
    reason = why_not_triton(num_streams, device, dtype)
    if backend == "triton":
        if reason is not None:
            raise ValueError(f"backend is 'triton', but {reason}; use 'auto' or 'torch'")
        return "triton"
    return "triton" if reason is None and device.type == "cuda" else "torch"
