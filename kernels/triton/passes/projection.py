"""The forward's large kernel, whichever operation asks.

`combine_and_project_kernel` mixes the streams of the site that ends and, on the tile still in
registers, projects the result for the site that begins; each half can run alone, and a delayed site
is read there too. `combine`, `pre`, `coefficients`, `combine_pre`, `combine_read` and `head` are
this kernel with different flags, with `passes.coefficients` behind it, so their results agree to
the bit: those of `combine_read` with `coefficients`, which have tiles of their own, the others with
each other.
"""

# ruff: noqa: RUF005 (Triton's language has no starred tuples)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arguments import Mixing, Sizes
from .. import tiles
from ..device import (
    load_columns,
    load_streams,
    mixed_stream,
    rounded,
    to_fp32,
)
from ..launch import Launch, prepared
from .phi_products import add_products, as_transposed_operand, count_sums, load_phi, store_sums


@triton.jit
def load_tiles(x_ptr, f_ptr, t64, c, N: tl.constexpr, C: tl.constexpr, COMBINE: tl.constexpr):
    """The tiles [BT, BC] of the N streams and, in a tuple of its own, of f (COMBINE)."""
    mask = (c < C)[None, :]
    streams = load_streams(x_ptr, t64[:, None] * (N * C) + c[None, :], mask, C, N)
    f = ()
    if COMBINE:
        f = (tl.load(f_ptr + t64[:, None] * C + c[None, :], mask, 0.0),)
    return streams, f


@triton.jit(do_not_specialize=["T"])
def combine_and_project_kernel(
    x_ptr,
    f_ptr,
    f_bias_ptr,
    h_post_ptr,
    h_res_ptr,
    y_ptr,
    phi_ptr,
    partial_ptr,
    h_pre_ptr,
    u_ptr,
    T,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    TERMS: tl.constexpr,
    SUMS: tl.constexpr,
    COMBINE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PROJECT: tl.constexpr,
    READ: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STEPS: tl.constexpr,
):
    """y = H_res x + H_post^T (f + f_bias) (COMBINE), else y = x; then, over one block of channels,
    z = vec(y) phi^T and the sum of squares of y (PROJECT), and u = h_pre y (READ).

    A program keeps phi of its STEPS * BC channels in shared memory. It takes every P-th tile of BT
    tokens, P = programs a block, so that all programs read and write side by side. Triton copies
    the tiles that come next to shared memory meanwhile.
    x, y [T, N, C]; f, u [T, C]; h_pre [T, N]; phi [ROWS, N*C] fp32; partial [tiles of BT tokens,
    blocks, ROWS + 1, BT]: z and the sum of squares. Each program's part of a tile is contiguous.
    """
    BLOCKS: tl.constexpr = (C + STEPS * BC - 1) // (STEPS * BC)
    block = tl.program_id(0)
    c0 = block * (STEPS * BC) + tl.arange(0, BC)
    phi = ()
    if PROJECT:
        for step in tl.static_range(STEPS):
            for i in tl.static_range(N):
                phi = phi + (load_phi(phi_ptr, i, c0 + step * BC, N, C, ROWS, TERMS),)

    for t0 in range(tl.program_id(1) * BT, T, tl.num_programs(1) * BT):
        t = t0 + tl.arange(0, BT)
        t_mask = t < T
        t64 = tl.minimum(t, T - 1).to(tl.int64)  # the last token for those that do not exist
        if COMBINE:
            h_post = load_columns(h_post_ptr, t64, None, N)
            h_res = load_columns(h_res_ptr, t64, None, N * N)
        if READ:
            h_pre = load_columns(h_pre_ptr, t64, None, N)
        sums = ()
        for _ in tl.static_range(SUMS):
            sums = sums + (tl.zeros((16, BT), tl.float32),)
        squares = tl.zeros((BT, BC // 8), tl.float32)
        for step in tl.static_range(STEPS):
            c = c0 + step * BC
            streams, f = load_tiles(x_ptr, f_ptr, t64, c, N, C, COMBINE)
            wide = ()
            if COMBINE:
                f = to_fp32(f[0])
                if HAS_BIAS:
                    f += tl.load(f_bias_ptr + c, c < C, 0.0).to(tl.float32)[None, :]
                for i in tl.static_range(N):
                    wide = wide + (to_fp32(streams[i]),)
            square = tl.zeros((BT, BC), tl.float32)
            if READ:
                u = tl.zeros((BT, BC), tl.float32)
            for i in tl.static_range(N):
                if COMBINE:
                    y = rounded(mixed_stream(wide, f, h_res, h_post, i, N), y_ptr.dtype.element_ty)
                    out = t64[:, None] * (N * C) + (i * C + c)[None, :]
                    tl.store(y_ptr + out, y, t_mask[:, None] & (c < C)[None, :])
                else:
                    y = streams[i]
                if READ:
                    u = tl.fma(h_pre[i][:, None], to_fp32(y), u)
                if PROJECT:
                    y32 = to_fp32(y)
                    square = tl.fma(y32, y32, square)
                    if TERMS == 1:
                        y = y32
                    y = as_transposed_operand(y)
                    sums = add_products(phi[step * N + i], y, sums, ROWS, TERMS)
            if READ:
                out = t64[:, None] * C + c[None, :]
                mask = t_mask[:, None] & (c < C)[None, :]
                tl.store(u_ptr + out, rounded(u, u_ptr.dtype.element_ty), mask)
            squares += tl.sum(tl.reshape(square, (BT, BC // 8, 8)), axis=2)

        if PROJECT:
            tile = t0 // BT * BLOCKS + block.to(tl.int64)
            z_ptr = partial_ptr + tile * ((ROWS + 1) * BT)
            store_sums(z_ptr, sums, ROWS, TERMS, BT)
            tl.store(z_ptr + ROWS * BT + tl.arange(0, BT), tl.sum(squares, axis=1))


STEP = 32
"""Channels that a warp works on at a time where it projects: 4 threads load 8 each of a token."""


MOST_PROGRAMS = 2**15
"""Most programs a block of channels where nothing is projected. There is no phi to load, so each
tile has a program, up to this many: CUDA's grid ends at 65,535 in its second dimension."""


@prepared
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    width: int,
    rows: int | None,
    combine: bool,
    read: bool,
    delayed: bool,
    f_bias: torch.dtype | None,
) -> tuple[Launch, tiles.Tile, int]:
    """The kernel for streams of this dtype, its tile, and how many blocks of channels there are;
    rows of phi and f_bias's dtype are None where there is none."""
    projecting = tiles.project_delayed if delayed else tiles.combine_and_project
    tile = (tiles.combine if rows is None else projecting)(n, width, dtype)
    step = tile.channels if rows is None else STEP
    terms = tiles.terms(dtype) if rows is not None else 1
    launch = Launch(
        combine_and_project_kernel,
        device,
        N=n,
        C=width,
        ROWS=rows or n,
        TERMS=terms,
        SUMS=count_sums(rows, terms) if rows is not None else 0,
        COMBINE=combine,
        HAS_BIAS=f_bias is not None,
        PROJECT=rows is not None,
        READ=read,
        BT=tile.tokens,
        BC=min(tile.channels, step),
        STEPS=tiles.cdiv(tile.channels, step),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    return launch, tile, tiles.cdiv(width, tile.channels)


def _run(
    sizes: Sizes,
    x: Tensor,
    phi: Tensor | None,
    mixing: Mixing | None,
    h_pre: Tensor | None,
    delayed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch `combine_and_project_kernel`: the streams, u and the partial projections."""
    tokens, n, width = sizes
    f, h_post, h_res, f_bias = mixing or (None,) * 4
    rows = None if phi is None else phi.shape[0]
    bias_dtype = None if f_bias is None else f_bias.dtype
    kind = (n, width, rows, f is not None, h_pre is not None, delayed, bias_dtype)
    launch, tile, blocks = _launch(x.device, x.dtype, *kind)
    count = tiles.cdiv(tokens, tile.tokens)
    y = x if mixing is None else torch.empty_like(x)
    u = None if h_pre is None else torch.empty_like(f)
    partial = None
    if phi is not None and rows is not None:
        partial = phi.new_empty(count, blocks, rows + 1, tile.tokens)
    if tokens > 0:
        programs = min(count, MOST_PROGRAMS if phi is None else tile.splits)
        tensors = (x, f, f_bias, h_post, h_res, y, phi, partial, h_pre, u)
        launch((blocks, programs), tensors, tokens)
    return y, u, partial


def combine_and_project(
    sizes: Sizes, x: Tensor, phi: Tensor | None, mixing: Mixing | None, delayed: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Launch `combine_and_project_kernel` on streams x.

    Args:
        phi: [rows, n*C], or None to combine alone.
        mixing: of the site that ends, or None to project x itself.
        delayed: with the tiles of `combine_project_and_read`, so with the bits of its projections.

    Returns:
        The streams that were projected (in the shape of x; x itself without mixing), and the
        partial projections [tiles, channel blocks, rows + 1, tokens of a tile]: z of each row of
        phi, then the sum of squares.
    """
    y, _, partial = _run(sizes, x, phi, mixing, None, delayed)
    return y, partial


def combine_project_and_read(
    sizes: Sizes, x: Tensor, phi: Tensor, mixing: Mixing, h_pre: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and u [..., C] = h_pre y of the streams y in the same pass, for h_pre [..., n].

    Returns:
        y, u, and the partial projections.
    """
    return _run(sizes, x, phi, mixing, h_pre, True)
