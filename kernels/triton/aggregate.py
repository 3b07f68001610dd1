"""u = H_pre x in Triton."""

from torch import Tensor

from ..arguments import Sizes
from .passes.aggregate import gradients_of_u, make_u
from .torch_operator import operator


@operator("aggregate", "u")
def _aggregate(x: Tensor, h_pre: Tensor) -> Tensor:
    """x [..., n, C], h_pre [..., n] -> u [..., C]."""
    return make_u(Sizes.of(x), x, h_pre)


@_aggregate.gradient
def _aggregate_backward(x: Tensor, h_pre: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and h_pre."""
    return gradients_of_u(Sizes.of(x), x, h_pre, du)


def aggregate(x: Tensor, h_pre: Tensor) -> Tensor:
    """See `reference.aggregate`."""
    return _aggregate(x, h_pre)
