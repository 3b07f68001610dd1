"""`hc_coefficients` in Triton: the projection of HC's streams, each normed and projected alone.

The kernels are those of `pre` with every stream as a token of its own, of one stream. What is made
of the projected rows is small, [T, n, n + 2], and stays PyTorch's; so are the partial sums added
up, whose order PyTorch may choose by how many tokens there are.
"""

from torch import Tensor, cat
from torch.nn.functional import pad

from ..arguments import Sizes
from ..mappings import HC_NORM_EPS, hc_from_projection
from . import tiles
from .passes.coefficient_gradients import CoefficientGradients
from .passes.projection import combine_and_project
from .passes.stream_gradients import stream_gradients
from .torch_operator import operator


def _streams_alone(x: Tensor) -> Sizes:
    return Sizes(x.numel() // x.shape[-1], 1, x.shape[-1])


@operator("hc_project", "projected")
def _hc_project(x: Tensor, theta: Tensor) -> Tensor:
    """x [..., n, C] -> theta x / rms(x) of each stream and, behind its rows, 1 / rms."""
    sizes, rows = _streams_alone(x), len(theta)
    if rows % 16 > 8 and tiles.terms(x.dtype) > 1:  # of eight streams: `count_sums`
        theta = pad(theta, (0, 0, 0, -rows % 16))
    _, partial = combine_and_project(sizes, x, theta, None)
    # [tiles, blocks, rows + 1, tokens of a tile]: z of each row, and the sum of squares
    sums = partial.sum(1).transpose(1, 2).flatten(0, 1)[: sizes.tokens]
    z, squares = sums[:, :rows], sums[:, -1:]
    inverse_r = (squares / sizes.width + HC_NORM_EPS).rsqrt()
    return cat([z * inverse_r, inverse_r], -1).view(*x.shape[:-1], rows + 1)


@_hc_project.gradient
def _hc_project_backward(
    x: Tensor, theta: Tensor, projected: Tensor, d_projected: Tensor
) -> tuple[Tensor, Tensor]:
    sizes, rows = _streams_alone(x), len(theta)
    kept = projected.view(sizes.tokens, rows + 1)
    normed, inverse_r = kept[:, :rows], kept[:, -1:]
    d_normed = d_projected.view(sizes.tokens, rows + 1)[:, :rows]  # nobody is given 1 / rms
    d_z = d_normed * inverse_r
    k = -(d_normed * normed).sum(-1) * inverse_r[:, 0].square() / sizes.width
    token = CoefficientGradients(cat([d_z.flatten(), k]))
    out = stream_gradients(sizes, x, phi=theta, token=token)
    return out.dx, out.d_phi


def hc_coefficients(
    x: Tensor, theta: Tensor, alpha: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.hc_coefficients`."""
    return hc_from_projection(_hc_project(x, theta)[..., :-1], alpha, bias)
