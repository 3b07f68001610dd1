"""`combine` in Triton: y = H_res x + H_post^T (f + f_bias)."""

from torch import Tensor

from ..arguments import Mixing
from .launch import dense
from .passes.projection import combine_and_project
from .passes.stream_gradients import streams_gradients
from .torch_operator import operator


@operator("combine", "y")
def _combine(x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor, f_bias: Tensor | None) -> Tensor:
    """x [T, n, C] -> y [T, n, C]."""
    y, _ = combine_and_project(x, None, Mixing(f, h_post, h_res, f_bias))
    return y


@_combine.gradient
def _combine_backward(
    x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor, f_bias: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = streams_gradients(x, dy=dy, x=x, mixing=Mixing(f, h_post, h_res, f_bias))
    d_f_bias = x.new_empty(0) if out.d_f_bias is None else out.d_f_bias
    return out.dx, out.df, out.d_post, out.d_res, d_f_bias


def combine(
    x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor, f_bias: Tensor | None = None
) -> Tensor:
    """See `reference.combine`."""
    n, width = x.shape[-2:]
    y = _combine(
        x.reshape(-1, n, width).contiguous(),
        f.reshape(-1, width).contiguous(),
        h_post.reshape(-1, n).contiguous(),
        h_res.reshape(-1, n, n).contiguous(),
        dense(f_bias),
    )
    return y.view(x.shape)
