"""The backward's second kernel over the streams, whichever operation asks.

`stream_gradients_kernel` builds the whole gradient of the projected streams y on chip,
    dY = dy + h_pre^T du + d_z phi + k y,
and, where y came from a combine, goes through it at once: df = H_post dY, dx = H_res^T dY, written
once; y itself it mixes again from x and f, which it reads anyway. A delayed site's boundary has the
gradient of h_pre there too. Sums over tokens or channels are partial sums, added up behind it.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...arguments import Mixing, Sizes
from .. import tiles
from ..launch import Launch, prepared
from .coefficient_gradients import CoefficientGradients
from .phi_gradient import phi_gradient
from .stream_gradients_kernel import stream_gradients_kernel
from .sums import Mixings, Rows, add_up


class StreamGradients(NamedTuple):
    """What `stream_gradients` returns; None where the operation has no such argument."""

    dx: Tensor
    df: Tensor | None
    d_post: Tensor | None
    d_res: Tensor | None
    d_f_bias: Tensor | None
    d_phi: Tensor | None
    d_pre: Tensor | None = None


@prepared
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    width: int,
    rows: int,
    has: tuple[bool, bool, bool, bool],
    f_bias: torch.dtype | None,
) -> tuple[Launch, tiles.Tile, int]:
    """The kernel for streams of this dtype, its tile, and how many blocks of channels there are;
    f_bias's dtype is None where there is none; `has`: whether there are dy, du, a
    combine to go through, and an h_pre of the site that ends."""
    tile = (tiles.read_gradients if has[3] else tiles.stream_gradients)(n, width, dtype)
    launch = Launch(
        stream_gradients_kernel,
        device,
        N=n,
        C=width,
        ROWS=rows,
        PART=tiles.rows_at_a_time(rows),
        TERMS=tiles.terms(dtype),
        HAS_DY=has[0],
        HAS_DU=has[1],
        COMBINE=has[2],
        HAS_BIAS=f_bias is not None,
        READ=has[3],
        MIXING_WIDTH=triton.next_power_of_2(n + n * n + n * has[3]),
        BT=tile.tokens,
        BC=tile.channels,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    return launch, tile, tiles.cdiv(width, tile.channels)


def stream_gradients(
    sizes: Sizes,
    y: Tensor,
    *,
    dy: Tensor | None = None,
    du: Tensor | None = None,
    phi: Tensor,
    token: CoefficientGradients,
    x: Tensor | None = None,
    mixing: Mixing | None = None,
    h_pre: Tensor | None = None,
) -> StreamGradients:
    """Launch `stream_gradients_kernel`, phi's gradient, and what adds up all partial sums of both
    and of `token`.

    Args:
        y: the streams that were projected.
        dy, du: gradients of y and u; an absent one is zero.
        phi, token: the projection and what came of the tokens' gradients. h_pre is read where
            there is du.
        x, mixing: the arguments of the combine that made y, or None: dx is dY.
        h_pre: what made u of y where `combine_read` did; else it is that of token.
    """
    tokens, n, width = sizes
    f, h_post, h_res, f_bias = mixing or (None,) * 4
    dx = torch.empty_like(y)
    df = d_post = d_res = d_f_bias = d_mixing = f_bias_sums = d_pre = None
    if tokens == 0:
        given = (*(mixing or [None] * 4), phi, h_pre)
        return StreamGradients(dx, *(None if t is None else torch.zeros_like(t) for t in given))
    bias_dtype = None if f_bias is None else f_bias.dtype
    has = (dy is not None, du is not None, mixing is not None, h_pre is not None)
    launch, tile, blocks = _launch(y.device, y.dtype, n, width, phi.shape[0], has, bias_dtype)
    programs = min(tile.splits, tiles.cdiv(tokens, tile.tokens))  # none without tokens
    biases = mixings = None
    if h_pre is not None:
        d_pre = torch.empty_like(h_pre)
    if mixing is not None:
        df, d_post, d_res = torch.empty_like(f), torch.empty_like(h_post), torch.empty_like(h_res)
        d_mixing = h_res.new_empty(blocks, tokens, n + n * n + n * has[3])
        mixings = Mixings(d_mixing, d_post, d_res, d_pre)
    if f_bias is not None:
        f_bias_sums, d_f_bias = h_post.new_empty(programs, width), h_post.new_empty(width)
        biases = Rows(f_bias_sums, d_f_bias)
    given = (y, dy, du, token.d_z_k_h_pre, phi, x, f, f_bias, h_post, h_res, h_pre)
    launch((blocks, programs), (*given, dx, df, d_mixing, f_bias_sums), tokens)
    of_phi = phi_gradient(sizes, y, token.d_z_k_h_pre, phi.shape[0])
    add_up(of_phi, biases, token.left, mixings)
    if d_f_bias is not None:
        d_f_bias = d_f_bias.to(bias_dtype)
    return StreamGradients(dx, df, d_post, d_res, d_f_bias, of_phi.out, d_pre)
