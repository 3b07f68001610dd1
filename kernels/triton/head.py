"""`head` in Triton: the learned exit of `deepseek_v4`, a `pre` with H_pre alone."""

from torch import Tensor

from ..arguments import Options
from .passes.finish import finish
from .passes.projection import combine_and_project
from .passes.stream_gradients import streams_gradients
from .passes.token_gradients import token_gradients
from .torch_operator import operator


@operator("head", "u", "z_over_r", "inverse_r")
def _head(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, pre_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, n, C] -> [T, C], and for the backward z / r [T, n] and 1 / r [T]."""
    _, partial = combine_and_project(x, fn, None)
    out = finish(x, partial, scale, base, Options(1, norm_eps, pre_eps), aggregate=True)
    return out.u, out.z_over_r, out.inverse_r


@_head.gradient
def _head_backward(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    z_over_r: Tensor,
    inverse_r: Tensor,
    du: Tensor,
    pre_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(1, pre_eps=pre_eps)
    token = token_gradients(x, z_over_r, inverse_r, scale, base, options, du=du)
    out = streams_gradients(x, du=du, phi=fn, token=token)
    return out.dx, out.d_phi, token.d_alpha, token.d_bias


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
