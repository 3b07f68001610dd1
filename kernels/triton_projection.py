"""The forward: two kernels over the streams, whichever operation asks.

`project_kernel` (K1) mixes the streams of the site that ends and, on the tile still in registers,
projects the result for the site that begins; each half can run alone. `finish_kernel` (K2) adds up
the partial projections, makes the coefficients and aggregates. `combine`, `pre`, `coefficients`,
`combine_pre` and `head` are these kernels with different flags, so their results agree to the bit.
"""

# ruff: noqa: RUF005, SIM108 (Triton's language has no starred tuples)

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
    sum_splits,
)
from .triton_launch import on_device, pack_weights


@triton.jit(do_not_specialize=["T"])
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
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    COMBINE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PROJECT: tl.constexpr,
    SPLITS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """y = H_res x + H_post^T (f + f_bias) (COMBINE), else y = x; then, over one split of the
    channels, z = vec(y) phi^T and the sum of squares of y (PROJECT).

    x, y [T, N, C]; f [T, C]; weights [TERMS, N*C, R]; z [SPLITS, T, ROWS]; square [SPLITS, T].
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    t64 = t.to(tl.int64)
    t_mask = t < T
    split = tl.program_id(1)
    SHARE: tl.constexpr = ((C + SPLITS * BC - 1) // (SPLITS * BC)) * BC
    row = tl.arange(0, R)

    if COMBINE:
        h_post = load_columns(h_post_ptr, t64, t_mask, N)
        h_res = load_columns(h_res_ptr, t64, t_mask, N * N)
    z = tl.zeros((BT, R), tl.float32)
    square = tl.zeros((BT, BC), tl.float32)

    for c0 in range(0, SHARE, BC):
        c = split * SHARE + c0 + tl.arange(0, BC)
        if C % (SPLITS * BC) == 0:
            mask = t_mask[:, None]
        else:
            mask = t_mask[:, None] & (c < C)[None, :]
        offsets = t64[:, None] * (N * C) + c[None, :]
        streams = load_streams(x_ptr, offsets, mask, C, N)  # N x [BT, BC]
        if COMBINE:
            f = tl.load(f_ptr + t64[:, None] * C + c[None, :], mask, 0.0).to(tl.float32)
            if HAS_BIAS:
                f += tl.load(f_bias_ptr + c, c < C, 0.0).to(tl.float32)[None, :]
        for i in tl.static_range(N):
            if COMBINE:
                y = mixed_stream(streams, f, h_res, h_post, i, N).to(y_ptr.dtype.element_ty)
                y = computed_once(y)
                tl.store(y_ptr + offsets + i * C, y, mask)
            else:
                y = streams[i]
            if PROJECT:
                y32 = y.to(tl.float32)
                if C % (SPLITS * BC) != 0:  # f_bias has left values in columns that do not exist
                    y32 = tl.where(mask, y32, 0.0)
                square = tl.fma(y32, y32, square)
                w = weights_ptr + (i * C + c)[:, None] * R + row[None, :]
                for term in tl.static_range(TERMS):
                    weight = tl.load(w + term * (N * C * R), (c < C)[:, None], 0.0)  # [BC, R]
                    if TERMS == 1:
                        z = tl.dot(y32, weight, z, input_precision="tf32x3")
                    else:
                        z = product(y, weight, z)

    if PROJECT:
        base = split.to(tl.int64) * T + t64
        z_offsets = base[:, None] * ROWS + row[None, :]
        tl.store(z_ptr + z_offsets, z, t_mask[:, None] & (row < ROWS)[None, :])
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
    SPLITS: tl.constexpr,
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
    square = sum_splits(square_ptr, t64, t_mask, stride, SPLITS)
    inverse = tl.rsqrt(square / (N * C) + norm_eps)
    tl.store(inverse_ptr + t64, inverse, t_mask)

    alpha = tl.load(alpha_ptr)
    h_pre = ()
    for j in tl.static_range(N):
        normed = sum_splits(z_ptr, t64 * ROWS + j, t_mask, stride * ROWS, SPLITS) * inverse
        tl.store(normed_ptr + t64 * ROWS + j, normed, t_mask)
        weight = tl.sigmoid(tl.fma(normed, alpha, tl.load(bias_ptr + j))) + pre_eps
        h_pre = h_pre + (weight,)
        if not AGGREGATE:
            tl.store(h_pre_ptr + t64 * N + j, weight, t_mask)

    if AGGREGATE:
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            mask = t_mask[:, None] & (c < C)[None, :]
            streams = load_streams(x_ptr, t64[:, None] * (N * C) + c[None, :], mask, C, N)
            u = tl.zeros((BT, BC), tl.float32)
            for j in tl.static_range(N):
                u = tl.fma(h_pre[j][:, None], streams[j].to(tl.float32), u)
            tl.store(u_ptr + t64[:, None] * C + c[None, :], u.to(u_ptr.dtype.element_ty), mask)

    if MIXING:
        j = tl.arange(0, N)
        offsets = t64[:, None] * ROWS + N + j[None, :]  # [BT, N]
        mask = t_mask[:, None] & (j >= 0)[None, :]
        normed = sum_splits(z_ptr, offsets, mask, stride * ROWS, SPLITS) * inverse[:, None]
        tl.store(normed_ptr + offsets, normed, mask)
        logits = tl.fma(normed, tl.load(alpha_ptr + 1), tl.load(bias_ptr + N + j)[None, :])
        tl.store(h_post_ptr + t64[:, None] * N + j[None, :], 2.0 * tl.sigmoid(logits), mask)

        entry = j[:, None] * N + j[None, :]  # [N, N] (dst, src)
        offsets = t64[:, None, None] * ROWS + 2 * N + entry[None, :, :]
        mask = t_mask[:, None, None] & (entry >= 0)[None, :, :]
        normed = sum_splits(z_ptr, offsets, mask, stride * ROWS, SPLITS)
        normed = normed * inverse[:, None, None]
        tl.store(normed_ptr + offsets, normed, mask)
        entry_bias = tl.load(bias_ptr + 2 * N + entry)[None, :, :]
        logits = tl.fma(normed, tl.load(alpha_ptr + 2), entry_bias)
        matrix = sinkhorn_forward(logits, ITERATIONS, SINKHORN_EPS)
        tl.store(h_res_ptr + t64[:, None, None] * (N * N) + entry[None, :, :], matrix, mask)


@dataclass(frozen=True)
class Partial:
    """The partial projections of one `project_kernel`: z [splits, T, rows], square [splits, T]."""

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
    f, h_post, h_res, f_bias = mixing if mixing is not None else (None, None, None, None)
    y = x if mixing is None else torch.empty_like(x)
    partial = None
    rows, weights = n, None
    if phi is not None:
        rows, weights = phi.shape[0], pack_weights(phi, x.dtype)
        partial = Partial(
            x.new_empty(tile.splits, tokens, rows, dtype=torch.float32),
            x.new_empty(tile.splits, tokens, dtype=torch.float32),
        )
    if tokens == 0:
        return y, partial
    with on_device(x):
        project_kernel[(triton.cdiv(tokens, tile.tokens), tile.splits)](
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
            N=n,
            C=width,
            ROWS=rows,
            R=config.padded(rows),
            TERMS=1 if weights is None else weights.shape[0],
            COMBINE=mixing is not None,
            HAS_BIAS=f_bias is not None,
            PROJECT=phi is not None,
            SPLITS=tile.splits,
            BT=tile.tokens,
            BC=tile.channels,
            num_warps=tile.warps,
            num_stages=tile.stages,
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
            SPLITS=partial.z.shape[0],
            BT=tile.tokens,
            BC=tile.channels,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out
