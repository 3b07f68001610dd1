"""The forward's large kernel, whichever operation asks.

`combine_and_project_kernel` mixes the streams of the site that ends and, on the tile still in
registers, projects the result for the site that begins; each half can run alone. `combine`, `pre`,
`coefficients`, `combine_pre` and `head` are this kernel with different flags, with
`passes.finish` behind it, so their results agree to the bit.
"""

# ruff: noqa: RUF005, SIM108 (Triton's language has no starred tuples)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arguments import Mixing
from .. import tiles
from ..device import (
    load_columns,
    load_streams,
    mixed_stream,
    product,
    rounded,
    widened,
)
from ..launch import launch, pack_weights


@triton.jit
def load_tiles(x_ptr, f_ptr, t64, c, N: tl.constexpr, C: tl.constexpr, COMBINE: tl.constexpr):
    """The tiles [BT, BC] of the N streams and, in a tuple of its own, of f (COMBINE)."""
    mask = (c < C)[None, :]
    streams = load_streams(x_ptr, t64[:, None] * (N * C) + c[None, :], mask, C, N)
    f = ()
    if COMBINE:
        f = (tl.load(f_ptr + t64[:, None] * C + c[None, :], mask, 0.0),)
    return streams, f


@triton.jit
def as_operand(tile):
    """[rows, BC] -> the same, its channels in the order of `as_transposed_operand`."""
    ROWS: tl.constexpr = tile.shape[0]
    BC: tl.constexpr = tile.shape[1]
    tile = tl.permute(tl.reshape(tile, (ROWS, BC // 8, 4, 2)), (0, 2, 1, 3))
    return tl.reshape(tile, (ROWS, BC))


@triton.jit
def as_transposed_operand(tile):
    """[BT, BC] -> [BC, BT], its channels in an order in which nothing has to move.

    A thread loads 8 channels in a row (16 bits each). A product of matrices wants 2 of each 8 from
    it. A product does not depend on the order of the channels, if both factors have the same one.
    So both name the channels such that every thread has already loaded its part of the product.
    (fp32 factors move anyway.)
    """
    BT: tl.constexpr = tile.shape[0]
    BC: tl.constexpr = tile.shape[1]
    tile = tl.permute(tl.reshape(tile, (BT, BC // 8, 4, 2)), (2, 1, 3, 0))
    return tl.reshape(tile, (BC, BT))


@triton.jit
def load_phi(
    weights_ptr,
    i: tl.constexpr,
    c,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    TERMS: tl.constexpr,
):
    """The tiles [16, BC] of phi for stream i that `add_products` multiplies with.

    16 rows at a time, a tile for each term. The rest is 8 rows at most. Its three terms fill two
    tiles: the first term over the second, and zeros over the third.
    """
    FULL: tl.constexpr = ROWS // 16
    row = tl.arange(0, 16)
    mask = (c < C)[None, :]
    columns = weights_ptr + (i * C + c)[None, :]
    tiles = ()
    for j in tl.static_range(FULL):
        for term in tl.static_range(TERMS):
            w = columns + (term * R + 16 * j + row)[:, None] * (N * C)
            tiles = tiles + (as_operand(tl.load(w, mask, 0.0)),)
    if ROWS % 16 > 0 and TERMS == 1:
        w = columns + (16 * FULL + row)[:, None] * (N * C)
        tiles = tiles + (as_operand(tl.load(w, mask, 0.0)),)
    elif ROWS % 16 > 0:
        rest = 16 * FULL + row % 8
        w = columns + (row // 8 * R + rest)[:, None] * (N * C)
        tiles = tiles + (as_operand(tl.load(w, mask, 0.0)),)
        w = columns + (2 * R + rest)[:, None] * (N * C)
        tiles = tiles + (as_operand(tl.load(w, mask & (row >= 8)[:, None], 0.0)),)
    return tiles


@triton.jit
def add_products(phi, y, sums, ROWS: tl.constexpr, TERMS: tl.constexpr):
    """The sums [16, BT] with phi y [BC, BT] of one stream added.

    With three terms, 16 rows have two sums: one of the first term, one of the two others. The rest
    has one: the first term in its upper half, the others in its lower half.
    """
    FULL: tl.constexpr = ROWS // 16
    longer = ()
    if TERMS == 1:
        for j in tl.static_range(len(sums)):
            longer = longer + (tl.dot(phi[j], y, sums[j], input_precision="tf32x3"),)
    else:
        for j in tl.static_range(FULL):
            low = product(phi[3 * j + 1], y, sums[2 * j + 1])
            low = product(phi[3 * j + 2], y, low)
            longer = longer + (product(phi[3 * j], y, sums[2 * j]), low)
        if ROWS % 16 > 0:
            z = product(phi[3 * FULL], y, sums[2 * FULL])
            longer = longer + (product(phi[3 * FULL + 1], y, z),)
    return longer


@triton.jit
def store_sums(out_ptr, sums, ROWS: tl.constexpr, TERMS: tl.constexpr, BT: tl.constexpr):
    """z [ROWS, BT] of the sums of `add_products`."""
    FULL: tl.constexpr = ROWS // 16
    out = out_ptr + tl.arange(0, BT)[None, :]
    row = tl.arange(0, 16)[:, None]
    for j in tl.static_range(FULL):
        if TERMS == 1:
            z = sums[j]
        else:
            z = sums[2 * j] + sums[2 * j + 1]
        tl.store(out + (16 * j + row) * BT, z)
    if ROWS % 16 > 0 and TERMS == 1:
        tl.store(out + (16 * FULL + row) * BT, sums[FULL], 16 * FULL + row < ROWS)
    elif ROWS % 16 > 0:
        z = tl.sum(tl.reshape(sums[2 * FULL], (2, 8, BT)), axis=0)
        row = 16 * FULL + tl.arange(0, 8)[:, None]
        tl.store(out + row * BT, z, row < ROWS)


@triton.jit(do_not_specialize=["T"])
def combine_and_project_kernel(
    x_ptr,
    f_ptr,
    f_bias_ptr,
    h_post_ptr,
    h_res_ptr,
    y_ptr,
    weights_ptr,
    partial_ptr,
    T,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    SUMS: tl.constexpr,
    COMBINE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PROJECT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STEPS: tl.constexpr,
):
    """y = H_res x + H_post^T (f + f_bias) (COMBINE), else y = x; then, over one block of channels,
    z = vec(y) phi^T and the sum of squares of y (PROJECT).

    A program keeps phi of its STEPS * BC channels in shared memory. It takes every P-th tile of BT
    tokens, P = programs a block, so that all programs read and write side by side. Triton copies
    the tiles that come next to shared memory meanwhile.
    x, y [T, N, C]; f [T, C]; weights [TERMS, R, N*C]; partial [tiles of BT tokens, blocks,
    ROWS + 1, BT]: z and the sum of squares. Each program's part of a tile is contiguous.
    """
    BLOCKS: tl.constexpr = (C + STEPS * BC - 1) // (STEPS * BC)
    block = tl.program_id(0)
    c0 = block * (STEPS * BC) + tl.arange(0, BC)
    phi = ()
    if PROJECT:
        for step in tl.static_range(STEPS):
            for i in tl.static_range(N):
                phi = phi + (load_phi(weights_ptr, i, c0 + step * BC, N, C, ROWS, R, TERMS),)

    for t0 in range(tl.program_id(1) * BT, T, tl.num_programs(1) * BT):
        t = t0 + tl.arange(0, BT)
        t_mask = t < T
        t64 = tl.minimum(t, T - 1).to(tl.int64)  # the last token for those that do not exist
        if COMBINE:
            h_post = load_columns(h_post_ptr, t64, None, N)
            h_res = load_columns(h_res_ptr, t64, None, N * N)
        sums = ()
        for _ in tl.static_range(SUMS):
            sums = sums + (tl.zeros((16, BT), tl.float32),)
        squares = tl.zeros((BT, BC // 8), tl.float32)
        for step in tl.static_range(STEPS):
            c = c0 + step * BC
            streams, f = load_tiles(x_ptr, f_ptr, t64, c, N, C, COMBINE)
            wide = ()
            if COMBINE:
                f = widened(f[0])
                if HAS_BIAS:
                    f += tl.load(f_bias_ptr + c, c < C, 0.0).to(tl.float32)[None, :]
                for i in tl.static_range(N):
                    wide = wide + (widened(streams[i]),)
            square = tl.zeros((BT, BC), tl.float32)
            for i in tl.static_range(N):
                if COMBINE:
                    y = rounded(mixed_stream(wide, f, h_res, h_post, i, N), y_ptr.dtype.element_ty)
                    out = t64[:, None] * (N * C) + (i * C + c)[None, :]
                    tl.store(y_ptr + out, y, t_mask[:, None] & (c < C)[None, :])
                else:
                    y = streams[i]
                if PROJECT:
                    y32 = widened(y)
                    square = tl.fma(y32, y32, square)
                    if TERMS == 1:
                        y = y32
                    y = as_transposed_operand(y)
                    sums = add_products(phi[step * N + i], y, sums, ROWS, TERMS)
            squares += tl.sum(tl.reshape(square, (BT, BC // 8, 8)), axis=2)

        if PROJECT:
            tile = t0 // BT * BLOCKS + block.to(tl.int64)
            z_ptr = partial_ptr + tile * ((ROWS + 1) * BT)
            store_sums(z_ptr, sums, ROWS, TERMS, BT)
            tl.store(z_ptr + ROWS * BT + tl.arange(0, BT), tl.sum(squares, axis=1))


STEP = 32
"""Channels that a warp works on at a time: 4 threads load 8 each of one token."""


MOST_PROGRAMS = 2**15
"""Most programs a block of channels where nothing is projected. There is no phi to load, so each
tile has a program, up to this many: CUDA's grid ends at 65,535 in its second dimension."""


def count_sums(rows: int, terms: int) -> int:
    """The sums of 16 rows that `add_products` keeps for phi [rows, n*C] in so many terms."""
    full, rest = divmod(rows, 16)
    return (1 if terms == 1 else 2) * full + (rest > 0)


def combine_and_project(
    x: Tensor, phi: Tensor | None, mixing: Mixing | None
) -> tuple[Tensor, Tensor | None]:
    """Launch `combine_and_project_kernel` on x [T, n, C].

    Args:
        phi: [rows, n*C], or None to combine alone.
        mixing: of the site that ends, or None to project x itself.

    Returns:
        The streams that were projected (x itself without mixing), and the partial projections
        [tiles, channel blocks, rows + 1, tokens of a tile]: z of each row of phi, then the sum of
        squares.
    """
    tokens, n, width = x.shape
    tile = tiles.project(n, width, x.dtype)
    count, blocks = triton.cdiv(tokens, tile.tokens), triton.cdiv(width, tile.channels)
    f, h_post, h_res, f_bias = mixing if mixing is not None else (None,) * 4
    y = x if mixing is None else torch.empty_like(x)
    partial = None
    rows, weights = n, None
    if phi is not None:
        rows, weights = phi.shape[0], pack_weights(phi, x.dtype)
        partial = x.new_empty(count, blocks, rows + 1, tile.tokens, dtype=torch.float32)
    if tokens == 0:
        return y, partial
    terms = 1 if weights is None else weights.shape[0]
    launch(
        combine_and_project_kernel,
        (blocks, min(count, MOST_PROGRAMS if phi is None else tile.splits)),
        x,
        f,
        f_bias,
        h_post,
        h_res,
        y,
        weights,
        partial,
        tokens,
        N=n,
        C=width,
        ROWS=rows,
        R=tiles.padded(rows),
        TERMS=terms,
        SUMS=0 if phi is None else count_sums(rows, terms),
        COMBINE=mixing is not None,
        HAS_BIAS=f_bias is not None,
        PROJECT=phi is not None,
        BT=tile.tokens,
        BC=min(tile.channels, STEP),
        STEPS=triton.cdiv(tile.channels, STEP),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    return y, partial
