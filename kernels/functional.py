"""The public operations: they check their arguments, then hand them to Triton or the reference.

Shapes, dtypes and equations: `reference`, under the same names. Every operation raises ValueError
naming the argument that does not fit, what came and what was wanted, and takes `backend=`
(`backend.resolve` says what it means).
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .arguments import NORM_FORMS, SINKHORN_ORDERS, Mixing, Options
from .backend import resolve
from .checks import (
    check,
    check_boundary,
    check_choice,
    check_combine,
    check_dtype,
    check_iterations,
    check_pre,
    check_streams,
    once,
)
from .reference import accumulation_dtype


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast would round the reference's products to 16 bits, as it does in a backward that is
    called under it; "meta" tensors know of none."""
    if x.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _checked(options: Options) -> Options:
    """At least one iteration, and every eps a float: Triton compiles a kernel for each integer."""
    iterations, norm_eps, pre_eps, sinkhorn_eps, norm_form, order = options
    check_iterations(iterations)
    check_choice("norm_form", norm_form, NORM_FORMS)
    check_choice("sinkhorn_order", order, SINKHORN_ORDERS)
    eps = (float(norm_eps), float(pre_eps), float(sinkhorn_eps))
    return Options(iterations, *eps, norm_form, order)


def _run(
    operation: str,
    backend: str | None,
    n: int,
    x: Tensor,
    *args: Any,
    options: Options | None = None,
    **kw: Any,
) -> Any:
    """Call `operation` on x, of n streams, in the Triton implementation or in the reference."""
    if resolve(backend, n, x.device, x.dtype) == "torch":
        named = {} if options is None else dict(zip(Options._fields, options, strict=True))
        with _without_autocast(x):
            return getattr(reference, operation)(x, *args, **kw, **named)
    from .triton import operations  # imports triton: only where it is wanted

    if options is not None:
        kw["options"] = options
    return getattr(operations, operation)(x, *args, **kw)


def sinkhorn(
    logits: Tensor, iterations: int = 20, eps: float = 0.0, *, backend: str | None = None
) -> Tensor:
    """See `reference.sinkhorn`."""
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected [..., n, n]")
    check_dtype("logits", logits)
    check_iterations(iterations)
    return _run("sinkhorn", backend, logits.shape[-1], logits, iterations, float(eps))


def coefficients(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    iterations: int = 20,
    norm_eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 0.0,
    norm_form: str = "inside_root",
    sinkhorn_order: str = "columns_first",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.coefficients`."""
    n = once(check_pre, x, phi, alpha, bias)
    given = (iterations, norm_eps, pre_eps, sinkhorn_eps, norm_form, sinkhorn_order)
    options = _checked(Options(*given))
    return _run("coefficients", backend, n, x, phi, alpha, bias, options=options)


def aggregate(x: Tensor, h_pre: Tensor, *, backend: str | None = None) -> Tensor:
    """See `reference.aggregate`."""
    check_streams("x", x)
    check("h_pre", h_pre, x.shape[:-1], accumulation_dtype(x), x)
    return _run("aggregate", backend, x.shape[-2], x, h_pre)


def pre(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    iterations: int = 20,
    norm_eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 0.0,
    norm_form: str = "inside_root",
    sinkhorn_order: str = "columns_first",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.pre`."""
    n = once(check_pre, x, phi, alpha, bias)
    given = (iterations, norm_eps, pre_eps, sinkhorn_eps, norm_form, sinkhorn_order)
    options = _checked(Options(*given))
    return _run("pre", backend, n, x, phi, alpha, bias, options=options)


def combine(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    f_bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """See `reference.combine`."""
    n = once(check_boundary, x, f, h_post, h_res, f_bias)
    return _run("combine", backend, n, x, f, h_post, h_res, f_bias)


def combine_pre(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    f_bias: Tensor | None = None,
    iterations: int = 20,
    norm_eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 0.0,
    norm_form: str = "inside_root",
    sinkhorn_order: str = "columns_first",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.combine_pre`."""
    n = once(check_boundary, x, f, h_post, h_res, f_bias, phi, alpha, bias)
    given = (iterations, norm_eps, pre_eps, sinkhorn_eps, norm_form, sinkhorn_order)
    options = _checked(Options(*given))
    tensors = (x, f, h_post, h_res, phi, alpha, bias)
    return _run("combine_pre", backend, n, *tensors, f_bias=f_bias, options=options)


def combine_read(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    h_pre: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    f_bias: Tensor | None = None,
    iterations: int = 20,
    norm_eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 0.0,
    norm_form: str = "inside_root",
    sinkhorn_order: str = "columns_first",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.combine_read`."""
    n = once(check_boundary, x, f, h_post, h_res, f_bias, phi, alpha, bias, h_pre)
    given = (iterations, norm_eps, pre_eps, sinkhorn_eps, norm_form, sinkhorn_order)
    options = _checked(Options(*given))
    tensors = (x, f, h_post, h_res, h_pre, phi, alpha, bias)
    return _run("combine_read", backend, n, *tensors, f_bias=f_bias, options=options)


def pre_with_h_pre(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    backend: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.pre_with_h_pre`."""
    n = once(check_pre, x, phi, alpha, bias)
    checked = _checked(Options(**options))
    return _run("pre_with_h_pre", backend, n, x, phi, alpha, bias, options=checked)


def combine_pre_with_h_pre(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    f_bias: Tensor | None = None,
    backend: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.combine_pre_with_h_pre`."""
    n = once(check_boundary, x, f, h_post, h_res, f_bias, phi, alpha, bias)
    tensors = (x, f, h_post, h_res, phi, alpha, bias)
    checked = _checked(Options(**options))
    return _run("combine_pre_with_h_pre", backend, n, *tensors, f_bias=f_bias, options=checked)


@torch.no_grad()
def rebuild(
    x: Tensor,
    h_pre: Sequence[Tensor],
    ended: Sequence[Mixing],
    *,
    ys: Sequence[Tensor] | None = None,
    us: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """See `reference.rebuild`."""
    check_streams("x", x)
    *tokens, n, width = x.shape
    if len(h_pre) != len(ended) + 1:
        raise ValueError(
            f"h_pre has {len(h_pre)} sites and ended {len(ended)}; expected one more h_pre, that"
            " of the last site"
        )
    for name, given, count, tail in (
        ("ys", ys, len(ended), (n, width)),
        ("us", us, len(h_pre), (width,)),
    ):
        if given is not None and len(given) != count:
            raise ValueError(f"{name} has {len(given)} tensors; expected {count}")
        for index, tensor in enumerate(given or ()):
            check(f"{name}[{index}]", tensor, (*tokens, *tail), x.dtype, x)
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{index}] is not contiguous; results are written into it")
    for index, weights in enumerate(h_pre):
        check(f"h_pre[{index}]", weights, (*tokens, n), accumulation_dtype(x), x)
    ended = [Mixing(*site) for site in ended]  # a plain tuple will do
    for index, site in enumerate(ended):
        check_combine(x.shape, x, *site, of=f"ended[{index}]'s ")
    return _run("rebuild", backend, n, x, h_pre, ended, ys=ys, us=us)


def head(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    norm_eps: float = 1e-6,
    pre_eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """See `reference.head`."""
    check_streams("x", x)
    n, width = x.shape[-2:]
    dtype = accumulation_dtype(x)
    check("fn", fn, (n, n * width), dtype, x)
    check("scale", scale, (1,), dtype, x)
    check("base", base, (n,), dtype, x)
    norm_eps, pre_eps = float(norm_eps), float(pre_eps)
    return _run("head", backend, n, x, fn, scale, base, norm_eps=norm_eps, pre_eps=pre_eps)


def hc_coefficients(
    x: Tensor, theta: Tensor, alpha: Tensor, bias: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.hc_coefficients`."""
    check_streams("x", x)
    n, width = x.shape[-2:]
    dtype = accumulation_dtype(x)
    check("theta", theta, (n + 2, width), dtype, x)
    check("alpha", alpha, (3,), dtype, x)
    check("bias", bias, (n * n + 2 * n,), dtype, x)
    return _run("hc_coefficients", backend, n, x, theta, alpha, bias)
