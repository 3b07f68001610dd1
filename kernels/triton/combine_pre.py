"""`combine_pre` in Triton: the boundary between two sites.

Forward: combine and project, coefficients, aggregate. Backward: the gradients of the tokens, of the
streams, of phi, and the sums behind them.

The backward writes dx once, complete: x is an output of the boundary before and used nowhere else,
so autograd has nothing to add.
"""

from torch import Tensor

from ..arguments import DEFAULT, Mixing, Options
from .passes.coefficient_gradients import coefficient_gradients
from .passes.coefficients import coefficients_and_u
from .passes.projection import combine_and_project
from .passes.stream_gradients import stream_gradients
from .torch_operator import operator


@operator("combine_pre", "y", "u", "h_post", "h_res", "h_pre", "normed")
def _combine_pre(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    f_bias: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [..., n, C] or [..., n*C] -> y; u, h_post, h_res, h_pre of the next site; normed."""
    mixing = Mixing(f, h_post, h_res, f_bias)
    sizes, leading = mixing.sizes, h_post.shape[:-1]
    y, partial = combine_and_project(sizes, x, phi, mixing)
    out = coefficients_and_u(sizes, leading, y, partial, alpha, bias, options, aggregate=True)
    return y, out.u, out.h_post, out.h_res, out.h_pre, out.normed


@_combine_pre.gradient
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
    dy: Tensor | None,
    du: Tensor | None,
    d_next_post: Tensor | None,
    d_next_res: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mixing = Mixing(f, h_post, h_res, f_bias)
    sizes, given = mixing.sizes, {"du": du, "d_post": d_next_post, "d_res": d_next_res}
    token = coefficient_gradients(sizes, y, normed, alpha, bias, options, **given)
    out = stream_gradients(sizes, y, dy=dy, du=du, phi=phi, token=token, x=x, mixing=mixing)
    to_sublayer = (out.dx, out.df, out.d_post, out.d_res)
    return (*to_sublayer, out.d_phi, token.d_alpha, token.d_bias, out.d_f_bias)


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
    options: Options = DEFAULT,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.combine_pre_with_h_pre`."""
    return _combine_pre(x, f, h_post, h_res, phi, alpha, bias, f_bias, options)


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
    options: Options = DEFAULT,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.combine_pre`."""
    return _combine_pre(x, f, h_post, h_res, phi, alpha, bias, f_bias, options)[:4]
