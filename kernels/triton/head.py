"""`head` in Triton: the learned exit of `deepseek_v4`, a `pre` with H_pre alone."""

from torch import Tensor

from ..arguments import Options, Sizes
from .passes.coefficient_gradients import coefficient_gradients
from .passes.coefficients import coefficients_and_u
from .passes.projection import combine_and_project
from .passes.stream_gradients import stream_gradients
from .torch_operator import operator


@operator("head", "u", "normed")
def _head(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, pre_eps: float
) -> tuple[Tensor, Tensor]:
    """x [..., n, C] -> [..., C]; normed."""
    sizes, options = Sizes.of(x), Options(1, norm_eps, pre_eps)
    _, partial = combine_and_project(sizes, x, fn, None)
    out = coefficients_and_u(sizes, x.shape[:-2], x, partial, scale, base, options, aggregate=True)
    return out.u, out.normed


@_head.gradient
def _head_backward(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    normed: Tensor,
    du: Tensor,
    pre_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes, options = Sizes.of(x), Options(1, pre_eps=pre_eps)
    token = coefficient_gradients(sizes, x, normed, scale, base, options, du=du)
    out = stream_gradients(sizes, x, du=du, phi=fn, token=token)
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
    return _head(x, fn, scale, base, norm_eps, pre_eps)
