"""`pre` in Triton: coefficients of a site and u = H_pre x."""

import torch
from torch import Tensor

from .passes.finish import finish
from .passes.projection import project
from .passes.stream_gradients import streams_gradients
from .passes.token_gradients import coefficients_gradients
from .torch_operator import operator


@operator("pre")
def _pre(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    iterations: int,
    norm_eps: float,
    pre_eps: float,
    sinkhorn_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [T, n, C] -> u, h_post, h_res, h_pre; for the backward z / r [T, rows] and 1 / r [T]."""
    _, partial = project(x, phi, None)
    out = finish(
        x,
        partial,
        alpha,
        bias,
        aggregate=True,
        iterations=iterations,
        norm_eps=norm_eps,
        pre_eps=pre_eps,
        sinkhorn_eps=sinkhorn_eps,
    )
    return out.u, out.h_post, out.h_res, out.h_pre, out.normed, out.inverse


@_pre.register_fake
def _(x, phi, alpha, bias, iterations, norm_eps, pre_eps, sinkhorn_eps):  # type: ignore[no-untyped-def]
    tokens, n, width = x.shape
    return (
        x.new_empty(tokens, width),
        alpha.new_empty(tokens, n),
        alpha.new_empty(tokens, n, n),
        alpha.new_empty(tokens, n),
        alpha.new_empty(tokens, phi.shape[0]),
        alpha.new_empty(tokens),
    )


@operator("pre_backward")
def _pre_backward(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    normed: Tensor,
    inverse: Tensor,
    du: Tensor | None,
    d_post: Tensor | None,
    d_res: Tensor | None,
    iterations: int,
    pre_eps: float,
    sinkhorn_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, phi, alpha and bias."""
    token = coefficients_gradients(
        x,
        normed,
        inverse,
        alpha,
        bias,
        du=du,
        d_post=d_post,
        d_res=d_res,
        iterations=iterations,
        pre_eps=pre_eps,
        sinkhorn_eps=sinkhorn_eps,
    )
    out = streams_gradients(x, du=du, phi=phi, token=token)
    return out.dx, out.d_phi, token.d_alpha, token.d_bias


@_pre_backward.register_fake
def _(x, phi, alpha, bias, *rest):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(tensor) for tensor in (x, phi, alpha, bias))


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, phi, alpha, bias, ctx.iterations, _, ctx.pre_eps, ctx.sinkhorn_eps = inputs
    ctx.save_for_backward(x, phi, alpha, bias, *output[-2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, du, d_post, d_res, *_):  # type: ignore[no-untyped-def]
    gradients = _pre_backward(
        *ctx.saved_tensors, du, d_post, d_res, ctx.iterations, ctx.pre_eps, ctx.sinkhorn_eps
    )
    return (*gradients, None, None, None, None)


_pre.register_autograd(_backward, setup_context=_setup)


def pre_with_h_pre(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    iterations: int = 20,
    norm_eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.pre_with_h_pre`."""
    tokens, (n, width) = x.shape[:-2], x.shape[-2:]
    u, h_post, h_res, h_pre, _, _ = _pre(
        x.reshape(-1, n, width).contiguous(),
        phi.contiguous(),
        alpha.contiguous(),
        bias.contiguous(),
        iterations,
        norm_eps,
        pre_eps,
        sinkhorn_eps,
    )
    return (
        u.view(*tokens, width),
        h_post.view(*tokens, n),
        h_res.view(*tokens, n, n),
        h_pre.detach().view(*tokens, n),
    )


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
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.pre`."""
    return pre_with_h_pre(
        x,
        phi,
        alpha,
        bias,
        iterations=iterations,
        norm_eps=norm_eps,
        pre_eps=pre_eps,
        sinkhorn_eps=sinkhorn_eps,
    )[:3]
