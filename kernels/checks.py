"""Argument checks of the public operations: ValueError with what came and what was wanted."""

import torch
from torch import Tensor

from .reference import accumulation_dtype

STREAM_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_streams(name: str, x: Tensor) -> None:
    """x is [..., n, C] with n and C at least 1, in a floating dtype that the kernels know."""
    if x.dim() < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [..., n, C], n and C >= 1")
    check_dtype(name, x)


def check_dtype(name: str, tensor: Tensor) -> None:
    """A floating dtype that the kernels know."""
    if tensor.dtype not in STREAM_DTYPES:
        wanted = ", ".join(str(dtype) for dtype in STREAM_DTYPES)
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected one of {wanted}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """The tensor has exactly this shape and lives where x does."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected {shape}"
            f" for x of shape {tuple(x.shape)}"
        )
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, where x is")


def check_parameter(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """A parameter: this shape, where x is, in the accumulation dtype (fp32 for all but float64)."""
    check_shape(name, tensor, shape, x)
    _check_dtype(name, tensor, accumulation_dtype(x), x)


def check_tokens(
    name: str, tensor: Tensor, x: Tensor, tail: tuple[int, ...], dtype: torch.dtype
) -> None:
    """A per-token tensor: the token dimensions of x, then `tail`."""
    check_shape(name, tensor, tuple(x.shape[:-2]) + tail, x)
    _check_dtype(name, tensor, dtype, x)


def check_iterations(iterations: int) -> None:
    """At least one Sinkhorn iteration, and a whole number of them."""
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations is {iterations}; expected a whole number, at least 1")


def _check_dtype(name: str, tensor: Tensor, dtype: torch.dtype, x: Tensor) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected {dtype} for x in {x.dtype}")
