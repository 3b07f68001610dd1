"""`combine_read` in Triton: the boundary between two delayed sites, in a single pass.

Forward: combine, project and read, all of a tile that is in registers; then the coefficients, which
nobody wants before the next boundary. 2n + 2 passes over the streams.

Backward: what comes of the coefficients' gradients needs no stream. So one kernel makes the
gradients of x, f and the mixing, and that of h_pre, for which it mixes y again: 3n + 3 passes, and
n for phi's gradient.
"""

from torch import Tensor

from ..arguments import DEFAULT, Mixing, Options
from .passes.coefficient_gradients import coefficient_gradients
from .passes.coefficients import coefficients_and_u
from .passes.projection import combine_project_and_read
from .passes.stream_gradients import stream_gradients
from .torch_operator import operator


@operator("combine_read", "y", "u", "h_pre", "h_post", "h_res", "normed")
def _combine_read(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    h_pre: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    f_bias: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [..., n, C] or [..., n*C] -> y, u; h_pre, h_post, h_res of the next site; normed."""
    mixing = Mixing(f, h_post, h_res, f_bias)
    sizes, leading = mixing.sizes, h_post.shape[:-1]
    y, u, partial = combine_project_and_read(sizes, x, phi, mixing, h_pre)
    out = coefficients_and_u(sizes, leading, y, partial, alpha, bias, options, aggregate=False)
    return y, u, out.h_pre, out.h_post, out.h_res, out.normed


@_combine_read.gradient
def _combine_read_backward(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    h_pre: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    f_bias: Tensor | None,
    y: Tensor,
    normed: Tensor,
    dy: Tensor | None,
    du: Tensor | None,
    d_next_pre: Tensor | None,
    d_next_post: Tensor | None,
    d_next_res: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mixing = Mixing(f, h_post, h_res, f_bias)
    sizes = mixing.sizes
    given = {"d_pre": d_next_pre, "d_post": d_next_post, "d_res": d_next_res}
    token = coefficient_gradients(sizes, y, normed, alpha, bias, options, **given)
    out = stream_gradients(
        sizes,
        y,
        dy=dy,
        du=du,
        phi=phi,
        token=token,
        x=x,
        mixing=mixing,
        h_pre=h_pre,
    )
    to_sublayer = (out.dx, out.df, out.d_post, out.d_res, out.d_pre)
    return (*to_sublayer, out.d_phi, token.d_alpha, token.d_bias, out.d_f_bias)


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
    options: Options = DEFAULT,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.combine_read`."""
    return _combine_read(x, f, h_post, h_res, h_pre, phi, alpha, bias, f_bias, options)
