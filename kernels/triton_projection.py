"""The forward: two kernels over the streams, whichever operation asks.

`project_kernel` (K1) mixes the streams of the site that ends and, on the tile still in registers,
projects the result for the site that begins; each half can run alone. `finish_kernel` (K2) adds up
the partial projections, makes the coefficients and aggregates. `combine`, `pre`, `coefficients`,
`combine_pre` and `head` are these kernels with different flags, so their results agree to the bit.
"""

# ruff: noqa: RUF005 (Triton's language has no starred tuples)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_config as config
from .triton_device import (
    computed_once,
    load_columns,
    load_streams,
    mixed_stream,
    product,
    sinkhorn_forward,
    sum_blocks,
)
from .triton_launch import on_device, pack_weights


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
    z_ptr,
    square_ptr,
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
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """y = H_res x + H_post^T (f + f_bias) (COMBINE), else y = x; then, over one block of channels,
    z = vec(y) phi^T and the sum of squares of y (PROJECT).

    A program keeps phi of its channels in shared memory and goes through `share` tokens.
    x, y [T, N, C]; f [T, C]; weights [TERMS, R, N*C]; z [blocks, T, ROWS]; square [blocks, T].
    """
    block = tl.program_id(0)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, T)
    c = block * BC + tl.arange(0, BC)
    row = tl.arange(0, R)
    term_row = tl.arange(0, TERMS * R)
    if HAS_BIAS:
        f_bias = tl.load(f_bias_ptr + c, c < C, 0.0).to(tl.float32)[None, :]
    if PROJECT:
        weights = ()
        for i in tl.static_range(N):
            w = weights_ptr + term_row[:, None] * (N * C) + (i * C + c)[None, :]
            weights = weights + (tl.load(w, (c < C)[None, :], 0.0),)  # [TERMS * R, BC]

    t = first + tl.arange(0, BT)
    mask = (t < last)[:, None] & (c < C)[None, :]
    if PREFETCH:
        tiles = load_tiles(x_ptr, f_ptr, t.to(tl.int64), c, mask, N, C, COMBINE)
    for t0 in tl.range(first, last, BT, num_stages=STAGES):
        t = t0 + tl.arange(0, BT)
        t64 = t.to(tl.int64)
        t_mask = t < last
        mask = t_mask[:, None] & (c < C)[None, :]
        offsets = t64[:, None] * (N * C) + c[None, :]
        if COMBINE:
            h_post = load_columns(h_post_ptr, t64, t_mask, N)
            h_res = load_columns(h_res_ptr, t64, t_mask, N * N)
        if PREFETCH:  # the next tiles, while this one is worked on
            streams, f = tiles
            t_next = t + BT
            mask_next = (t_next < last)[:, None] & (c < C)[None, :]
            tiles = load_tiles(x_ptr, f_ptr, t_next.to(tl.int64), c, mask_next, N, C, COMBINE)
        else:
            streams, f = load_tiles(x_ptr, f_ptr, t64, c, mask, N, C, COMBINE)
        if COMBINE:
            f = f[0].to(tl.float32)
            if HAS_BIAS:
                f += f_bias
        z = tl.zeros((TERMS * R, BT), tl.float32)
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

        if PROJECT:
            base = block * T.to(tl.int64) + t64
            total = tl.sum(tl.reshape(z, (TERMS, R, BT)), axis=0)  # [R, BT]
            z_mask = (row < ROWS)[:, None] & t_mask[None, :]
            tl.store(z_ptr + base[None, :] * ROWS + row[:, None], total, z_mask)
            tl.store(square_ptr + base, tl.sum(square, axis=1), t_mask)


@triton.jit(do_not_specialize=["T"])
def finish_kernel(
    x_ptr,
    z_ptr,
    square_ptr,
    alpha_ptr,
    bias_ptr,
    h_pre_ptr,
    h_post_ptr,
    h_res_ptr,
    u_ptr,
    normed_ptr,
    inverse_ptr,
    T,
    norm_eps,
    pre_eps,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    AGGREGATE: tl.constexpr,
    MIXING: tl.constexpr,
    ITERATIONS: tl.constexpr,
    SINKHORN_EPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Partial projections -> coefficients, and u = H_pre x (AGGREGATE).

    Without MIXING (`head`) there are only the N rows of H_pre. normed [T, ROWS] is z / r and
    inverse [T] is 1 / r: what the backward keeps. Sinkhorn comes last, so that u need not wait.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    t64 = t.to(tl.int64)
    t_mask = t < T
    stride = T.to(tl.int64)
    j = tl.arange(0, N)
    if AGGREGATE:  # on its way while the partial sums are added up, and so on for every tile
        c = tl.arange(0, BC)
        c_mask = t_mask[:, None] & (c < C)[None, :]
        next_streams = load_streams(x_ptr, t64[:, None] * (N * C) + c[None, :], c_mask, C, N)
    square = sum_blocks(square_ptr, t64[:, None], t_mask[:, None], stride, BLOCKS, BT, 1, BS)
    inverse = tl.rsqrt(square / (N * C) + norm_eps)  # [BT, 1]
    tl.store(inverse_ptr + t64[:, None], inverse, t_mask[:, None])

    alpha = tl.load(alpha_ptr)
    offsets = t64[:, None] * ROWS + j[None, :]  # [BT, N]
    mask = t_mask[:, None] & (j >= 0)[None, :]
    normed = sum_blocks(z_ptr, offsets, mask, stride * ROWS, BLOCKS, BT, N, BS) * inverse
    tl.store(normed_ptr + offsets, normed, mask)
    weights = tl.sigmoid(tl.fma(normed, alpha, tl.load(bias_ptr + j)[None, :])) + pre_eps
    if not AGGREGATE:
        tl.store(h_pre_ptr + t64[:, None] * N + j[None, :], weights, mask)

    if AGGREGATE:
        h_pre = ()
        for i in tl.static_range(N):
            h_pre = h_pre + (tl.sum(tl.where(j[None, :] == i, weights, 0.0), axis=1),)
        for _ in range(0, C, BC):
            streams, mask_now = next_streams, c_mask
            c += BC
            c_mask = t_mask[:, None] & (c < C)[None, :]
            next_streams = load_streams(x_ptr, t64[:, None] * (N * C) + c[None, :], c_mask, C, N)
            u = tl.zeros((BT, BC), tl.float32)
            for i in tl.static_range(N):
                u = tl.fma(h_pre[i][:, None], streams[i].to(tl.float32), u)
            u = u.to(u_ptr.dtype.element_ty)
            tl.store(u_ptr + t64[:, None] * C + (c - BC)[None, :], u, mask_now)

    if MIXING:
        offsets += N
        normed = sum_blocks(z_ptr, offsets, mask, stride * ROWS, BLOCKS, BT, N, BS) * inverse
        tl.store(normed_ptr + offsets, normed, mask)
        logits = tl.fma(normed, tl.load(alpha_ptr + 1), tl.load(bias_ptr + N + j)[None, :])
        tl.store(h_post_ptr + t64[:, None] * N + j[None, :], 2.0 * tl.sigmoid(logits), mask)

        k = tl.arange(0, N * N)
        offsets = t64[:, None] * ROWS + 2 * N + k[None, :]  # [BT, N*N]
        mask = t_mask[:, None] & (k >= 0)[None, :]
        normed = sum_blocks(z_ptr, offsets, mask, stride * ROWS, BLOCKS, BT, N * N, BS) * inverse
        tl.store(normed_ptr + offsets, normed, mask)
        logits = tl.fma(normed, tl.load(alpha_ptr + 2), tl.load(bias_ptr + 2 * N + k)[None, :])
        logits = tl.reshape(logits, (BT, N, N))  # (dst, src)
        matrix = sinkhorn_forward(logits, ITERATIONS, SINKHORN_EPS)
        matrix = tl.reshape(matrix, (BT, N * N))
        tl.store(h_res_ptr + t64[:, None] * (N * N) + k[None, :], matrix, mask)


@dataclass(frozen=True)
class Partial:
    """The partial projections of one `project_kernel`: z [blocks, T, rows], square [blocks, T]."""

    z: Tensor
    square: Tensor


def project(
    x: Tensor,
    phi: Tensor | None,
    mixing: tuple[Tensor, Tensor, Tensor, Tensor | None] | None,
) -> tuple[Tensor, Partial | None]:
    """Launch K1 on x [T, n, C].

    Args:
        phi: [rows, n*C], or None to combine alone.
        mixing: (f, h_post, h_res, f_bias) of the site that ends, or None to project x itself.

    Returns:
        The streams that were projected (x itself without mixing), and the partial projections.
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
        partial = Partial(
            x.new_empty(blocks, tokens, rows, dtype=torch.float32),
            x.new_empty(blocks, tokens, dtype=torch.float32),
        )
    if tokens == 0:
        return y, partial
    share = triton.cdiv(triton.cdiv(tokens, tile.splits), tile.tokens) * tile.tokens
    with on_device(x):
        project_kernel[(blocks, tile.splits)](
            x,
            f,
            f_bias,
            h_post,
            h_res,
            y,
            weights,
            None if partial is None else partial.z,
            None if partial is None else partial.square,
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
            STAGES=tile.stages,
            PREFETCH=tile.stages == 1,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
    return y, partial


@dataclass(frozen=True)
class Finished:
    """What `finish` returns: None where the operation has no such result."""

    u: Tensor | None
    h_pre: Tensor | None
    h_post: Tensor | None
    h_res: Tensor | None
    normed: Tensor
    inverse: Tensor


def finish(
    x: Tensor,
    partial: Partial,
    alpha: Tensor,
    bias: Tensor,
    *,
    aggregate: bool,
    iterations: int = 1,
    norm_eps: float,
    pre_eps: float,
    sinkhorn_eps: float = 0.0,
) -> Finished:
    """Launch K2 on the streams x [T, n, C] that were projected."""
    tokens, n, width = x.shape
    rows = partial.z.shape[-1]
    mixing = rows > n
    tile = config.finish(n, width, x.dtype)
    new = partial.square.new_empty
    out = Finished(
        u=x.new_empty(tokens, width) if aggregate else None,
        h_pre=None if aggregate else new(tokens, n),
        h_post=new(tokens, n) if mixing else None,
        h_res=new(tokens, n, n) if mixing else None,
        normed=new(tokens, rows),
        inverse=new(tokens),
    )
    if tokens == 0:
        return out
    with on_device(x):
        finish_kernel[(triton.cdiv(tokens, tile.tokens),)](
            x,
            partial.z,
            partial.square,
            alpha,
            bias,
            out.h_pre,
            out.h_post,
            out.h_res,
            out.u,
            out.normed,
            out.inverse,
            tokens,
            norm_eps,
            pre_eps,
            N=n,
            C=width,
            ROWS=rows,
            AGGREGATE=aggregate,
            MIXING=mixing,
            ITERATIONS=iterations,
            SINKHORN_EPS=sinkhorn_eps,
            BLOCKS=partial.z.shape[0],
            BS=min(triton.next_power_of_2(partial.z.shape[0]), 32 if n <= 4 else 4),
            BT=tile.tokens,
            BC=tile.channels,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out
