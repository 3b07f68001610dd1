"""`combine_pre` in Triton: the boundary between two sites, two kernels each way.

The backward writes dx once, complete: x is an output of the boundary before and used nowhere else,
so autograd has nothing to add.
"""

import torch
from torch import Tensor

from .launch import dense
from .passes.finish import finish
from .passes.projection import project
from .passes.stream_gradients import streams_gradients
from .passes.token_gradients import coefficients_gradients
from .torch_operator import operator


@operator("combine_pre")
def _combine_pre(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    f_bias: Tensor | None,
    iterations: int,
    norm_eps: float,
    pre_eps: float,
    sinkhorn_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [T, n, C] -> y; u, h_post, h_res, h_pre of the next site; for the backward z / r, 1 / r."""
    y, partial = project(x, phi, (f, h_post, h_res, f_bias))
    out = finish(
        y,
        partial,
        alpha,
        bias,
        aggregate=True,
        iterations=iterations,
        norm_eps=norm_eps,
        pre_eps=pre_eps,
        sinkhorn_eps=sinkhorn_eps,
    )
    return y, out.u, out.h_post, out.h_res, out.h_pre, out.normed, out.inverse


@_combine_pre.register_fake
def _(x, f, h_post, h_res, phi, *rest):  # type: ignore[no-untyped-def]
    tokens = x.shape[0]
    return (
        torch.empty_like(x),
        torch.empty_like(f),
        torch.empty_like(h_post),
        torch.empty_like(h_res),
        torch.empty_like(h_post),
        phi.new_empty(tokens, phi.shape[0]),
        phi.new_empty(tokens),
    )


@operator("combine_pre_backward")
def _combine_pre_backward(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    f_bias: Tensor | None,
    y: Tensor,
    normed: Tensor,
    inverse: Tensor,
    dy: Tensor | None,
    du: Tensor | None,
    d_next_post: Tensor | None,
    d_next_res: Tensor | None,
    iterations: int,
    pre_eps: float,
    sinkhorn_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, f, h_post, h_res, phi, alpha, bias and f_bias (empty where absent)."""
    token = coefficients_gradients(
        y,
        normed,
        inverse,
        alpha,
        bias,
        du=du,
        d_post=d_next_post,
        d_res=d_next_res,
        iterations=iterations,
        pre_eps=pre_eps,
        sinkhorn_eps=sinkhorn_eps,
    )
    mixing = (x, f, h_post, h_res, f_bias)
    out = streams_gradients(y, dy=dy, du=du, phi=phi, token=token, mixing=mixing)
    d_f_bias = x.new_empty(0) if out.d_f_bias is None else out.d_f_bias
    to_sublayer = (out.dx, out.df, out.d_post, out.d_res)
    return (*to_sublayer, out.d_phi, token.d_alpha, token.d_bias, d_f_bias)


@_combine_pre_backward.register_fake
def _(x, f, h_post, h_res, phi, alpha, bias, f_bias, *rest):  # type: ignore[no-untyped-def]
    d_f_bias = x.new_empty(0) if f_bias is None else torch.empty_like(f_bias)
    present = (x, f, h_post, h_res, phi, alpha, bias)
    return (*(torch.empty_like(tensor) for tensor in present), d_f_bias)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.iterations, _, ctx.pre_eps, ctx.sinkhorn_eps = inputs
    y, normed, inverse = output[0], output[-2], output[-1]
    ctx.save_for_backward(*tensors, y, normed, inverse)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, du, d_next_post, d_next_res, *_):  # type: ignore[no-untyped-def]
    f_bias = ctx.saved_tensors[7]
    *gradients, d_f_bias = _combine_pre_backward(
        *ctx.saved_tensors,
        dy,
        du,
        d_next_post,
        d_next_res,
        ctx.iterations,
        ctx.pre_eps,
        ctx.sinkhorn_eps,
    )
    return (*gradients, None if f_bias is None else d_f_bias, None, None, None, None)


_combine_pre.register_autograd(_backward, setup_context=_setup)


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
    iterations: int = 20,
    norm_eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.combine_pre_with_h_pre`."""
    tokens, (n, width) = x.shape[:-2], x.shape[-2:]
    y, u, h_post, h_res, h_pre, _, _ = _combine_pre(
        x.reshape(-1, n, width).contiguous(),
        f.reshape(-1, width).contiguous(),
        h_post.reshape(-1, n).contiguous(),
        h_res.reshape(-1, n, n).contiguous(),
        phi.contiguous(),
        alpha.contiguous(),
        bias.contiguous(),
        dense(f_bias),
        iterations,
        norm_eps,
        pre_eps,
        sinkhorn_eps,
    )
    return (
        y.view(x.shape),
        u.view(*tokens, width),
        h_post.view(*tokens, n),
        h_res.view(*tokens, n, n),
        h_pre.detach().view(*tokens, n),
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.combine_pre`."""
    return combine_pre_with_h_pre(
        x,
        f,
        h_post,
        h_res,
        phi,
        alpha,
        bias,
        f_bias=f_bias,
        iterations=iterations,
        norm_eps=norm_eps,
        pre_eps=pre_eps,
        sinkhorn_eps=sinkhorn_eps,
    )[:4]
