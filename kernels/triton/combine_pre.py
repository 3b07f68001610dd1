"""`combine_pre` in Triton: the boundary between two sites.

Forward: combine and project, finish, aggregate. Backward: the gradients of the tokens, the streams,
phi, and the sums behind them.

The backward writes dx once, complete: x is an output of the boundary before and used nowhere else,
so autograd has nothing to add.
"""

from torch import Tensor

from ..arguments import DEFAULT, Mixing, Options
from .launch import dense
from .passes.finish import finish
from .passes.projection import combine_and_project
from .passes.stream_gradients import streams_gradients
from .passes.token_gradients import token_gradients
from .torch_operator import operator


@operator("combine_pre", "y", "u", "h_post", "h_res", "h_pre", "z_over_r", "inverse_r")
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [T, n, C] -> y; u, h_post, h_res, h_pre of the next site; for the backward z / r, 1 / r."""
    y, partial = combine_and_project(x, phi, Mixing(f, h_post, h_res, f_bias))
    out = finish(y, partial, alpha, bias, options, aggregate=True)
    return y, out.u, out.h_post, out.h_res, out.h_pre, out.z_over_r, out.inverse_r


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
    z_over_r: Tensor,
    inverse_r: Tensor,
    dy: Tensor | None,
    du: Tensor | None,
    d_next_post: Tensor | None,
    d_next_res: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = {"du": du, "d_post": d_next_post, "d_res": d_next_res}
    token = token_gradients(y, z_over_r, inverse_r, alpha, bias, options, **given)
    mixing = Mixing(f, h_post, h_res, f_bias)
    out = streams_gradients(y, dy=dy, du=du, phi=phi, token=token, x=x, mixing=mixing)
    d_f_bias = x.new_empty(0) if out.d_f_bias is None else out.d_f_bias
    to_sublayer = (out.dx, out.df, out.d_post, out.d_res)
    return (*to_sublayer, out.d_phi, token.d_alpha, token.d_bias, d_f_bias)


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
        *options,
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
    options: Options = DEFAULT,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.combine_pre`."""
    next_site = {"f_bias": f_bias, "options": options}
    return combine_pre_with_h_pre(x, f, h_post, h_res, phi, alpha, bias, **next_site)[:4]
