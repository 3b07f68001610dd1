"""The forward: two kernels over the streams and a small one, whichever operation asks.

`project_kernel` mixes the streams of the site that ends and, on the tile still in registers,
projects the result for the site that begins; each half can run alone. `finish_kernel` adds up
the partial projections and makes the coefficients, with which `aggregate`'s own kernel reads the
streams once more. `combine`, `pre`, `coefficients`, `combine_pre` and `head` are these kernels with
different flags, so their results agree to the bit.
"""

# ruff: noqa: RUF005 (Triton's language has no starred tuples)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_config as config
from .triton_aggregate import weighted_sum
from .triton_device import (
    computed_once,
    load_columns,
    load_streams,
    mixed_stream,
    product,
    sinkhorn_forward,
    sum_blocks,
)
from .triton_launch import launch, pack_weights


@triton.jit
def load_tiles(x_ptr, f_ptr, t64, c, mask, N: tl.constexpr, C: tl.constexpr, COMBINE: tl.constexpr):
    """The tiles [BT, BC] of the N streams and, in a tuple of its own, of f (COMBINE)."""
    streams = load_streams(x_ptr, t64[:, None] * (N * C) + c[None, :], mask, C, N)
    f = ()
    if COMBINE:
        f = (tl.load(f_ptr + t64[:, None] * C + c[None, :], mask, 0.0),)
    return streams, f


@triton.jit(do_not_specialize=["T", "share"])
def project_kernel(
    x_ptr,
    f_ptr,
    f_bias_ptr,
    h_post_ptr,
    h_res_ptr,
    y_ptr,
    weights_ptr,
    partial_ptr,
    T,
    share,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    COMBINE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PROJECT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """y = H_res x + H_post^T (f + f_bias) (COMBINE), else y = x; then, over one block of channels,
    z = vec(y) phi^T and the sum of squares of y (PROJECT).

    A program keeps phi of its channels in shared memory and goes through `share` tokens.
    x, y [T, N, C]; f [T, C]; weights [TERMS, R, N*C]; partial [tiles of BT tokens, blocks,
    ROWS + 1, BT]: z and the sum of squares, in one piece a program and in one a tile.
    """
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    block = tl.program_id(0)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, T)
    row = tl.arange(0, R)
    HIGH: tl.constexpr = 2 * R if TERMS == 3 else R  # rows of phi in the first product
    high_row = tl.arange(0, HIGH)
    c = block * BC + tl.arange(0, BC)
    c_mask = (c < C)[None, :]
    if HAS_BIAS:
        f_bias = tl.load(f_bias_ptr + c, c < C, 0.0).to(tl.float32)[None, :]
    if PROJECT:
        weights = ()
        low_weights = ()
        for i in tl.static_range(N):
            w = weights_ptr + high_row[:, None] * (N * C) + (i * C + c)[None, :]
            weights = weights + (tl.load(w, c_mask, 0.0),)  # [HIGH, BC]
            if TERMS == 3:
                w = weights_ptr + (2 * R + row)[:, None] * (N * C) + (i * C + c)[None, :]
                low_weights = low_weights + (tl.load(w, c_mask, 0.0),)

    t = first + tl.arange(0, BT)
    mask = (t < last)[:, None] & c_mask
    tiles = load_tiles(x_ptr, f_ptr, t.to(tl.int64), c, mask, N, C, COMBINE)
    for t0 in range(first, last, BT):
        t = t0 + tl.arange(0, BT)
        t64 = t.to(tl.int64)
        t_mask = t < last
        mask = t_mask[:, None] & c_mask
        offsets = t64[:, None] * (N * C) + c[None, :]
        if COMBINE:
            h_post = load_columns(h_post_ptr, t64, t_mask, N)
            h_res = load_columns(h_res_ptr, t64, t_mask, N * N)
        streams, f = tiles
        t_next = t + BT  # the next tiles, while this one is worked on
        next_mask = (t_next < last)[:, None] & c_mask
        tiles = load_tiles(x_ptr, f_ptr, t_next.to(tl.int64), c, next_mask, N, C, COMBINE)
        if COMBINE:
            f = f[0].to(tl.float32)
            if HAS_BIAS:
                f += f_bias
        z = tl.zeros((HIGH, BT), tl.float32)
        z_low = tl.zeros((R, BT), tl.float32)
        square = tl.zeros((BT, BC), tl.float32)
        for i in tl.static_range(N):
            if COMBINE:
                y = mixed_stream(streams, f, h_res, h_post, i, N).to(y_ptr.dtype.element_ty)
                y = computed_once(y)
                tl.store(y_ptr + offsets + i * C, y, mask)
            else:
                y = streams[i]
            if PROJECT:
                if HAS_BIAS:  # it has left values in rows and columns that do not exist
                    y = tl.where(mask, y, 0.0)
                y32 = y.to(tl.float32)
                square = tl.fma(y32, y32, square)
                if TERMS == 1:
                    z = tl.dot(weights[i], tl.trans(y32), z, input_precision="tf32x3")
                else:
                    z = product(weights[i], tl.trans(y), z)
                    z_low = product(low_weights[i], tl.trans(y), z_low)

        if PROJECT:
            if TERMS == 3:
                z = tl.sum(tl.reshape(z, (2, R, BT)), axis=0) + z_low  # [R, BT]
            tile = t0 // BT * BLOCKS + block.to(tl.int64)
            base = partial_ptr + tile * ((ROWS + 1) * BT) + tl.arange(0, BT)
            tl.store(base[None, :] + row[:, None] * BT, z, (row < ROWS)[:, None])
            tl.store(base + ROWS * BT, tl.sum(square, axis=1))


@triton.jit(do_not_specialize=["T"])
def finish_kernel(
    partial_ptr,
    alpha_ptr,
    bias_ptr,
    h_pre_ptr,
    h_post_ptr,
    h_res_ptr,
    normed_ptr,
    inverse_ptr,
    T,
    norm_eps,
    pre_eps,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    MIXING: tl.constexpr,
    ITERATIONS: tl.constexpr,
    SINKHORN_EPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LOADS: tl.constexpr,
    TILE: tl.constexpr,
    BT: tl.constexpr,
):
    """Partial projections [tiles, BLOCKS, ROWS + 1, TILE] -> the coefficients of BT tokens.

    Without MIXING (`head`) there are only the N rows of H_pre. normed [T, ROWS] is z / r and
    inverse [T] is 1 / r: what the backward keeps.
    """
    first = tl.program_id(0) * BT
    t = first + tl.arange(0, BT)
    t64 = t.to(tl.int64)
    t_mask = t < T
    ALL: tl.constexpr = ROWS + 1
    tile_ptr = partial_ptr + (first // TILE).to(tl.int64) * (BLOCKS * ALL * TILE) + first % TILE
    square = sum_blocks(tile_ptr, ROWS, 1, ALL, TILE, BLOCKS, LOADS, BT)
    z_pre = sum_blocks(tile_ptr, 0, N, ALL, TILE, BLOCKS, LOADS, BT)
    if MIXING:  # all loads before the first store, which might change what they read
        z_post = sum_blocks(tile_ptr, N, N, ALL, TILE, BLOCKS, LOADS, BT)
        z_res = sum_blocks(tile_ptr, 2 * N, N * N, ALL, TILE, BLOCKS, LOADS, BT)

    inverse = tl.rsqrt(square / (N * C) + norm_eps)  # [BT, 1]
    tl.store(inverse_ptr + t64[:, None], inverse, t_mask[:, None])
    j = tl.arange(0, N)
    mask = t_mask[:, None] & (j >= 0)[None, :]
    normed = z_pre * inverse
    tl.store(normed_ptr + t64[:, None] * ROWS + j[None, :], normed, mask)
    logits = tl.fma(normed, tl.load(alpha_ptr), tl.load(bias_ptr + j)[None, :])
    tl.store(h_pre_ptr + t64[:, None] * N + j[None, :], tl.sigmoid(logits) + pre_eps, mask)

    if MIXING:
        normed = z_post * inverse
        tl.store(normed_ptr + t64[:, None] * ROWS + N + j[None, :], normed, mask)
        logits = tl.fma(normed, tl.load(alpha_ptr + 1), tl.load(bias_ptr + N + j)[None, :])
        tl.store(h_post_ptr + t64[:, None] * N + j[None, :], 2.0 * tl.sigmoid(logits), mask)

        k = tl.arange(0, N * N)
        mask = t_mask[:, None] & (k >= 0)[None, :]
        normed = z_res * inverse
        tl.store(normed_ptr + t64[:, None] * ROWS + 2 * N + k[None, :], normed, mask)
        logits = tl.fma(normed, tl.load(alpha_ptr + 2), tl.load(bias_ptr + 2 * N + k)[None, :])
        logits = tl.reshape(logits, (BT, N, N))  # (dst, src)
        matrix = sinkhorn_forward(logits, ITERATIONS, SINKHORN_EPS)
        matrix = tl.reshape(matrix, (BT, N * N))
        tl.store(h_res_ptr + t64[:, None] * (N * N) + k[None, :], matrix, mask)


def project(
    x: Tensor,
    phi: Tensor | None,
    mixing: tuple[Tensor, Tensor, Tensor, Tensor | None] | None,
) -> tuple[Tensor, Tensor | None]:
    """Launch `project_kernel` on x [T, n, C].

    Args:
        phi: [rows, n*C], or None to combine alone.
        mixing: (f, h_post, h_res, f_bias) of the site that ends, or None to project x itself.

    Returns:
        The streams that were projected (x itself without mixing), and the partial projections
        [tiles, channel blocks, rows + 1, tokens of a tile]: z of each row of phi, then the sum of
        squares.
    """
    tokens, n, width = x.shape
    tile = config.project(n, width, x.dtype)
    blocks = triton.cdiv(width, tile.channels)
    f, h_post, h_res, f_bias = mixing if mixing is not None else (None, None, None, None)
    y = x if mixing is None else torch.empty_like(x)
    partial = None
    rows, weights = n, None
    if phi is not None:
        rows, weights = phi.shape[0], pack_weights(phi, x.dtype)
        shape = triton.cdiv(tokens, tile.tokens), blocks, rows + 1, tile.tokens
        partial = x.new_empty(shape, dtype=torch.float32)
    if tokens == 0:
        return y, partial
    share = triton.cdiv(triton.cdiv(tokens, tile.splits), tile.tokens) * tile.tokens
    launch(
        project_kernel,
        (blocks, tile.splits),
        x,
        f,
        f_bias,
        h_post,
        h_res,
        y,
        weights,
        partial,
        tokens,
        share,
        N=n,
        C=width,
        ROWS=rows,
        R=config.padded(rows),
        TERMS=1 if weights is None else weights.shape[0],
        COMBINE=mixing is not None,
        HAS_BIAS=f_bias is not None,
        PROJECT=phi is not None,
        BT=tile.tokens,
        BC=tile.channels,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    return y, partial


@dataclass(frozen=True)
class Finished:
    """What `finish` returns: None where the operation has no such result."""

    u: Tensor | None
    h_pre: Tensor
    h_post: Tensor | None
    h_res: Tensor | None
    normed: Tensor
    inverse: Tensor


def finish(
    x: Tensor,
    partial: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    aggregate: bool,
    iterations: int = 1,
    norm_eps: float,
    pre_eps: float,
    sinkhorn_eps: float = 0.0,
) -> Finished:
    """Launch `finish_kernel` for the streams x [T, n, C] that were projected, and `aggregate`'s."""
    tokens, n, width = x.shape
    _, blocks, rows, tile_tokens = partial.shape
    rows -= 1
    mixing = rows > n
    tile = config.finish(n, width, x.dtype)
    block_tokens = min(tile.tokens, tile_tokens)
    h_pre = partial.new_empty(tokens, n)
    h_post = partial.new_empty(tokens, n) if mixing else None
    h_res = partial.new_empty(tokens, n, n) if mixing else None
    normed, inverse = partial.new_empty(tokens, rows), partial.new_empty(tokens)
    if tokens > 0:
        launch(
            finish_kernel,
            (triton.cdiv(tokens, block_tokens),),
            partial,
            alpha,
            bias,
            h_pre,
            h_post,
            h_res,
            normed,
            inverse,
            tokens,
            norm_eps,
            pre_eps,
            N=n,
            C=width,
            ROWS=rows,
            MIXING=mixing,
            ITERATIONS=iterations,
            SINKHORN_EPS=sinkhorn_eps,
            BLOCKS=blocks,
            LOADS=max(config.FINISH_LOADS * tile.warps, n * n * block_tokens),
            TILE=tile_tokens,
            BT=block_tokens,
            num_warps=tile.warps,
        )
    u = weighted_sum(x, h_pre) if aggregate else None
    return Finished(u, h_pre, h_post, h_res, normed, inverse)
