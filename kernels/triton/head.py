"""`head` in Triton: the learned exit of `deepseek_v4`, a `pre` with H_pre alone."""

import torch
from torch import Tensor

from .passes.finish import finish
from .passes.projection import project
from .passes.stream_gradients import streams_gradients
from .passes.token_gradients import coefficients_gradients
from .torch_operator import operator


@operator("head")
def _head(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, pre_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, n, C] -> [T, C], and for the backward z / r [T, n] and 1 / r [T]."""
    _, partial = project(x, fn, None)
    out = finish(x, partial, scale, base, aggregate=True, norm_eps=norm_eps, pre_eps=pre_eps)
    return out.u, out.normed, out.inverse


@_head.register_fake
def _(x, fn, scale, base, norm_eps, pre_eps):  # type: ignore[no-untyped-def]
    tokens, n, width = x.shape
    return x.new_empty(tokens, width), scale.new_empty(tokens, n), scale.new_empty(tokens)


@operator("head_backward")
def _head_backward(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    normed: Tensor,
    inverse: Tensor,
    du: Tensor,
    pre_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, fn, scale and base."""
    token = coefficients_gradients(x, normed, inverse, scale, base, du=du, pre_eps=pre_eps)
    out = streams_gradients(x, du=du, phi=fn, token=token)
    return out.dx, out.d_phi, token.d_alpha, token.d_bias


@_head_backward.register_fake
def _(x, fn, scale, base, *rest):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(tensor) for tensor in (x, fn, scale, base))


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, _, ctx.pre_eps = inputs
    ctx.save_for_backward(*tensors, *output[-2:])


def _backward(ctx, du, *_):  # type: ignore[no-untyped-def]
    return (*_head_backward(*ctx.saved_tensors, du, ctx.pre_eps), None, None)


_head.register_autograd(_backward, setup_context=_setup)


def head(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    norm_eps: float = 1e-6,
    pre_eps: float = 1e-6,
) -> Tensor:
    """See `reference.head`."""
    tokens, (n, width) = x.shape[:-2], x.shape[-2:]
    dense = (tensor.contiguous() for tensor in (fn, scale, base))
    out, _, _ = _head(x.reshape(-1, n, width).contiguous(), *dense, norm_eps, pre_eps)
    return out.view(*tokens, width)
