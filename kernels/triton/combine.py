"""`combine` in Triton: y = H_res x + H_post^T (f + f_bias)."""

from torch import Tensor

from ..arguments import Mixing
from .passes.combine_gradients import combine_gradients
from .passes.projection import combine_and_project
from .torch_operator import operator


@operator("combine", "y")
def _combine(x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor, f_bias: Tensor | None) -> Tensor:
    """x [..., n, C] or [..., n*C] -> y, in the same shape."""
    mixing = Mixing(f, h_post, h_res, f_bias)
    y, _ = combine_and_project(mixing.sizes, x, None, mixing)
    return y


@_combine.gradient
def _combine_backward(
    x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor, f_bias: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mixing = Mixing(f, h_post, h_res, f_bias)
    return combine_gradients(mixing.sizes, x, dy, mixing)[:5]


def combine(
    x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor, f_bias: Tensor | None = None
) -> Tensor:
    """See `reference.combine`."""
    return _combine(x, f, h_post, h_res, f_bias)
