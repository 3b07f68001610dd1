"""The backward's second kernel over the streams, whichever operation asks.

`stream_gradients_kernel` builds the whole gradient of the projected streams y on chip,
    dY = dy + h_pre^T du + d_z phi + k y,
and, where y came from a combine, goes through it at once: df = H_post dY, dx = H_res^T dY, written
once. Sums over tokens or channels are partial sums, added up behind it.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...arguments import Mixing
from .. import tiles
from ..launch import dense, launch, pack_weights
from .phi_gradient import phi_gradient
from .stream_gradients_kernel import stream_gradients_kernel
from .sums import sum_mixing, sum_rows
from .token_gradients import TokenGradients


@dataclass(frozen=True)
class StreamsGradients:
    """What `streams_gradients` returns; None where the operation has no such argument."""

    dx: Tensor
    df: Tensor | None
    d_post: Tensor | None
    d_res: Tensor | None
    d_f_bias: Tensor | None
    d_phi: Tensor | None


def streams_gradients(
    y: Tensor,
    *,
    dy: Tensor | None = None,
    du: Tensor | None = None,
    phi: Tensor | None = None,
    token: TokenGradients | None = None,
    x: Tensor | None = None,
    mixing: Mixing | None = None,
) -> StreamsGradients:
    """Launch `stream_gradients_kernel`, and what adds up its partial sums.

    Args:
        y: [T, n, C], the streams that were projected (any tensor of that shape without phi).
        dy, du: gradients of y and u; an absent one is zero.
        phi, token: the projection and what `token_gradients` returned, or None where
            nothing was projected.
        x, mixing: the arguments of the combine that made y, or None: dx is dY.
    """
    tokens, n, width = y.shape
    weights = None if phi is None else pack_weights(phi, y.dtype)
    dx, df, d_post, d_res, f_bias = torch.empty_like(y), None, None, None, None
    if mixing is not None:
        f_bias = mixing.f_bias
        df, d_post, d_res = map(torch.empty_like, mixing[:3])
    if tokens == 0:
        no_phi = None if phi is None else torch.zeros_like(phi)
        no_bias = None if f_bias is None else torch.zeros_like(f_bias)
        return StreamsGradients(dx, df, d_post, d_res, no_bias, no_phi)
    rows = n if phi is None else phi.shape[0]
    d_mixing, d_f_bias = _launch(y, dy, du, token, weights, rows, x, mixing, dx, df)
    if d_mixing is not None:
        sum_mixing(d_mixing, d_post, d_res)
    if d_f_bias is not None:
        d_f_bias = sum_rows(d_f_bias, d_f_bias.new_empty(width)).to(f_bias.dtype)
    d_phi = None if phi is None else phi_gradient(y, token.d_z)
    return StreamsGradients(dx, df, d_post, d_res, d_f_bias, d_phi)


def _launch(
    y: Tensor,
    dy: Tensor | None,
    du: Tensor | None,
    token: TokenGradients | None,
    weights: Tensor | None,
    rows: int,
    x: Tensor | None,
    mixing: Mixing | None,
    dx: Tensor,
    df: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Write dx and df; the partial sums of d_h_post and d_h_res, and those of d_f_bias."""
    tokens, n, width = y.shape
    tile = tiles.streams_backward(n, width, y.dtype)
    blocks = triton.cdiv(width, tile.channels)
    programs = min(tile.splits, triton.cdiv(tokens, tile.tokens))  # none without tokens
    f, h_post, h_res, f_bias = mixing if mixing is not None else (None,) * 4
    d_z, k, h_pre = (None,) * 3 if token is None else (token.d_z, token.k, token.h_pre)
    new = lambda *shape: y.new_empty(*shape, dtype=torch.float32)  # noqa: E731
    d_f_bias = None if f_bias is None else new(programs, width)
    d_mixing = None if mixing is None else new(blocks, tokens, n + n * n)
    # fmt: off
    launch(
        stream_gradients_kernel, (blocks, programs),
        y, dense(dy), dense(du), d_z, k, h_pre, weights, x, f, f_bias, h_post, h_res,
        dx, df, d_mixing, d_f_bias, tokens,
        N=n,
        C=width,
        ROWS=rows,
        R=tiles.padded(rows),
        PART=tiles.streams_backward_rows(rows),
        TERMS=1 if weights is None else weights.shape[0],
        PROJECT=weights is not None,
        HAS_DY=dy is not None,
        HAS_DU=du is not None,
        COMBINE=mixing is not None,
        HAS_BIAS=f_bias is not None,
        MIXING=triton.next_power_of_2(n + n * n),
        BT=tile.tokens,
        BC=tile.channels,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    # fmt: on
    return d_mixing, d_f_bias
