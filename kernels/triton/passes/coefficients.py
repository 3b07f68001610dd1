"""The forward's small kernel: a site's coefficients from the partial projections of its streams.

`coefficients_kernel` adds up what `combine_and_project_kernel` left and makes the coefficients;
with them `aggregate_kernel` reads the streams once more, for u.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arguments import Options, Sizes
from .. import tiles
from ..device import after_rows, sinkhorn_forward, sum_blocks
from ..launch import Launch, prepared
from .aggregate import make_u


@triton.jit(do_not_specialize=["T"])
def coefficients_kernel(
    partial_ptr,
    alpha_ptr,
    bias_ptr,
    h_pre_ptr,
    h_post_ptr,
    h_res_ptr,
    normed_ptr,
    T,
    norm_eps,
    pre_eps,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_MIXING: tl.constexpr,
    OUTSIDE_ROOT: tl.constexpr,
    ITERATIONS: tl.constexpr,
    SINKHORN_EPS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    BLOCKS: tl.constexpr,
    LOADS: tl.constexpr,
    TILE: tl.constexpr,
    BT: tl.constexpr,
):
    """Partial projections [tiles, BLOCKS, ROWS + 1, TILE] -> the coefficients of BT tokens.

    Without HAS_MIXING (`head`) there are only the N rows of H_pre. normed is what the backward
    keeps: z / r [T, ROWS], and behind it 1 / r [T].
    """
    z_over_r_ptr = normed_ptr
    inverse_r_ptr = after_rows(normed_ptr, T, ROWS)
    first = tl.program_id(0) * BT
    t = first + tl.arange(0, BT)
    t64 = t.to(tl.int64)
    t_mask = t < T
    ALL: tl.constexpr = ROWS + 1
    tile_ptr = partial_ptr + (first // TILE).to(tl.int64) * (BLOCKS * ALL * TILE) + first % TILE
    square = sum_blocks(tile_ptr, ROWS, 1, ALL, TILE, BLOCKS, LOADS, BT)
    z_pre = sum_blocks(tile_ptr, 0, N, ALL, TILE, BLOCKS, LOADS, BT)
    if HAS_MIXING:  # all loads before the first store, which might change what they read
        z_post = sum_blocks(tile_ptr, N, N, ALL, TILE, BLOCKS, LOADS, BT)
        z_res = sum_blocks(tile_ptr, 2 * N, N * N, ALL, TILE, BLOCKS, LOADS, BT)

    if OUTSIDE_ROOT:
        inverse_r = 1.0 / (tl.sqrt(square / (N * C)) + norm_eps)  # [BT, 1]
    else:
        inverse_r = tl.rsqrt(square / (N * C) + norm_eps)
    tl.store(inverse_r_ptr + t64[:, None], inverse_r, t_mask[:, None])
    j = tl.arange(0, N)
    mask = t_mask[:, None] & (j >= 0)[None, :]
    z_over_r = z_pre * inverse_r
    tl.store(z_over_r_ptr + t64[:, None] * ROWS + j[None, :], z_over_r, mask)
    logits = tl.fma(z_over_r, tl.load(alpha_ptr), tl.load(bias_ptr + j)[None, :])
    tl.store(h_pre_ptr + t64[:, None] * N + j[None, :], tl.sigmoid(logits) + pre_eps, mask)

    if HAS_MIXING:
        z_over_r = z_post * inverse_r
        tl.store(z_over_r_ptr + t64[:, None] * ROWS + N + j[None, :], z_over_r, mask)
        logits = tl.fma(z_over_r, tl.load(alpha_ptr + 1), tl.load(bias_ptr + N + j)[None, :])
        tl.store(h_post_ptr + t64[:, None] * N + j[None, :], 2.0 * tl.sigmoid(logits), mask)

        k = tl.arange(0, N * N)
        mask = t_mask[:, None] & (k >= 0)[None, :]
        z_over_r = z_res * inverse_r
        tl.store(z_over_r_ptr + t64[:, None] * ROWS + 2 * N + k[None, :], z_over_r, mask)
        logits = tl.fma(z_over_r, tl.load(alpha_ptr + 2), tl.load(bias_ptr + 2 * N + k)[None, :])
        logits = tl.reshape(logits, (BT, N, N))  # (dst, src)
        if ROWS_FIRST:
            logits = tl.permute(logits, (0, 2, 1))
        matrix = sinkhorn_forward(logits, ITERATIONS, SINKHORN_EPS)
        if ROWS_FIRST:
            matrix = tl.permute(matrix, (0, 2, 1))
        matrix = tl.reshape(matrix, (BT, N * N))
        tl.store(h_res_ptr + t64[:, None] * (N * N) + k[None, :], matrix, mask)


class Coefficients(NamedTuple):
    """What `coefficients_and_u` returns: None where the operation has no such result."""

    u: Tensor | None
    h_pre: Tensor
    h_post: Tensor | None
    h_res: Tensor | None
    normed: Tensor


@prepared
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    width: int,
    rows: int,
    blocks: int,
    tile_tokens: int,
    options: Options,
) -> tuple[Launch, int]:
    """The kernel for partial projections [tiles, blocks, rows + 1, tile_tokens] of streams of this
    dtype; and how many tokens a program of it has."""
    tile = tiles.coefficients(n, width, dtype)
    block_tokens = min(tile.tokens, tile_tokens)
    launch = Launch(
        coefficients_kernel,
        device,
        N=n,
        C=width,
        ROWS=rows,
        HAS_MIXING=rows > n,
        OUTSIDE_ROOT=options.outside_root,
        ITERATIONS=options.iterations,
        SINKHORN_EPS=options.sinkhorn_eps,
        ROWS_FIRST=options.rows_first,
        BLOCKS=blocks,
        LOADS=max(tiles.COEFFICIENTS_LOADS * tile.warps, n * n * block_tokens),
        TILE=tile_tokens,
        BT=block_tokens,
        num_warps=tile.warps,
    )
    return launch, block_tokens


def coefficients_and_u(
    sizes: Sizes,
    leading: Sequence[int],
    x: Tensor,
    partial: Tensor,
    alpha: Tensor,
    bias: Tensor,
    options: Options,
    *,
    aggregate: bool,
) -> Coefficients:
    """Launch `coefficients_kernel` for the streams x that were projected, and `aggregate`'s.

    The results have these leading dimensions, those of the tokens.
    """
    tokens, n, width = sizes
    _, blocks, rows, tile_tokens = partial.shape
    rows -= 1
    new = partial.new_empty
    h_pre, h_post, h_res, normed = new(*leading, n), None, None, new(*leading, rows + 1)
    if rows > n:
        h_post, h_res = new(*leading, n), new(*leading, n, n)
    if tokens > 0:
        kind = (n, width, rows, blocks, tile_tokens, options)
        launch, block_tokens = _launch(x.device, x.dtype, *kind)
        tensors = (partial, alpha, bias, h_pre, h_post, h_res, normed)
        eps = (options.norm_eps, options.pre_eps)
        launch((tiles.cdiv(tokens, block_tokens), 1), tensors, tokens, *eps)
    u = make_u(sizes, x, h_pre) if aggregate else None
    return Coefficients(u, h_pre, h_post, h_res, normed)
