"""Argument checks of the public operations: ValueError with what came and what was wanted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .reference import accumulation_dtype

STREAM_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


_passed: dict[tuple[Any, ...], int] = {}
"""What `once` has returned for arguments like these."""
MOST_KINDS = 4096
"""Kinds of arguments that `once` remembers: more come of sequences of very many lengths."""


def once(check: Callable[..., int], *tensors: Tensor | None) -> int:
    """`check(*tensors)`, made once for their shapes, dtypes and devices: all that it looks at.

    It is made each time while something traces, whose shapes may be symbols.
    """
    if torch.compiler.is_compiling() or type(tensors[0]) not in (Tensor, Parameter):
        return check(*tensors)
    kind = (check, *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors])
    found = _passed.get(kind)
    if found is None:
        found = check(*tensors)
        if len(_passed) >= MOST_KINDS:
            _passed.clear()
        _passed[kind] = found
    return found


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


def check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, x: Tensor
) -> None:
    """The tensor has exactly this shape, this dtype (None: any), and lives where x does."""
    device = x.device
    if tensor.shape == shape and dtype in (None, tensor.dtype) and tensor.device == device:
        return
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}"
            f" for x of shape {tuple(x.shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device}, where x is")
    raise ValueError(f"{name} has dtype {tensor.dtype}; expected {dtype} for x in {x.dtype}")


def check_iterations(iterations: int) -> None:
    """At least one Sinkhorn iteration, and a whole number of them."""
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations is {iterations}; expected a whole number, at least 1")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of these."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def _streams(x: Tensor, h_post: Tensor | None = None) -> tuple[int, ...]:
    """(*tokens, n, C) of streams x; with `h_post`, x may be [..., n*C]."""
    if h_post is None or x.dim() > h_post.dim() or h_post.dim() == 0:
        check_streams("x", x)
        return x.shape
    *tokens, wide = x.shape
    n = h_post.shape[-1]
    if n < 1 or wide < n or wide % n:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected [..., n, C] or [..., n*C], n = {n} as in"
            f" h_post of shape {tuple(h_post.shape)}"
        )
    check_dtype("x", x)
    return (*tokens, n, wide // n)


def _check_projection(
    shape: tuple[int, ...], x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor
) -> None:
    n, width = shape[-2:]
    rows, dtype = n * n + 2 * n, accumulation_dtype(x)
    check("phi", phi, (rows, n * width), dtype, x)
    check("alpha", alpha, (3,), dtype, x)
    check("bias", bias, (rows,), dtype, x)


def check_combine(
    shape: tuple[int, ...],
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    f_bias: Tensor | None,
    of: str = "",
) -> None:
    """What `combine` takes fits streams of this shape, (*tokens, n, C); `of` begins the names."""
    *tokens, n, width = shape
    dtype = accumulation_dtype(x)
    check(of + "f", f, (*tokens, width), x.dtype, x)
    check(of + "h_post", h_post, (*tokens, n), dtype, x)
    check(of + "h_res", h_res, (*tokens, n, n), dtype, x)
    if f_bias is not None:
        check(of + "f_bias", f_bias, (width,), None, x)


def check_pre(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> int:
    """What `pre` takes fits x [..., n, C]. Returns n."""
    shape = _streams(x)
    _check_projection(shape, x, phi, alpha, bias)
    return shape[-2]


def check_boundary(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    f_bias: Tensor | None,
    *projection: Tensor,
) -> int:
    """What `combine` takes fits x, [..., n, C] or [..., n*C]; with phi, alpha and bias what
    `combine_pre` takes, and with h_pre behind them `combine_read`. Returns n."""
    shape = _streams(x, h_post)
    check_combine(shape, x, f, h_post, h_res, f_bias)
    if len(projection) == 4:
        *projection, h_pre = projection  # type: ignore[assignment]
        check("h_pre", h_pre, shape[:-1], accumulation_dtype(x), x)
    if projection:
        _check_projection(shape, x, *projection)
    return shape[-2]
