"""The backward's second kernel over the streams, whichever operation asks.

It builds the whole gradient of the projected streams y on chip,
    dY = dy + h_pre^T du + d_z phi + k y,
and, where y came from a combine, goes through it at once: df = H_post dY, dx = H_res^T dY, written
once. Sums over tokens or channels are partial sums.

`coefficients_kernel` goes from the last tokens to the first, `streams_kernel` back, `phi_kernel` to
the first again: each starts with what the one before read last. All programs of a kernel work side
by side, on neighbouring tokens.
"""

# ruff: noqa: RUF005, SIM108 (Triton's language has no starred tuples)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arguments import Mixing
from .. import tiles
from ..device import load_columns, load_streams, product, rounded, row_sums, widened
from ..launch import dense, launch, pack_weights
from .phi_gradient import phi_gradient
from .sums import sum_mixing_kernel, sum_rows
from .token_gradients import TokenGradients


@triton.jit
def load_tiles(
    dy_ptr,
    y_ptr,
    x_ptr,
    du_ptr,
    f_ptr,
    t64,
    c,
    mask,
    N: tl.constexpr,
    C: tl.constexpr,
    HAS_DY: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_DU: tl.constexpr,
    COMBINE: tl.constexpr,
):
    """The tiles [BT, BC] of dy, y, x (N each), du and f, each a tuple; an absent one is empty."""
    narrow = t64[:, None] * C + c[None, :]
    offsets = t64[:, None] * (N * C) + c[None, :]
    dys, ys, xs, du, f = (), (), (), (), ()
    if HAS_DY:
        dys = load_streams(dy_ptr, offsets, mask, C, N)
    if PROJECT:
        ys = load_streams(y_ptr, offsets, mask, C, N)
    if COMBINE:
        xs = load_streams(x_ptr, offsets, mask, C, N)
        f = (tl.load(f_ptr + narrow, mask, 0.0),)
    if HAS_DU:
        du = (tl.load(du_ptr + narrow, mask, 0.0),)
    return dys, ys, xs, du, f


@triton.jit(do_not_specialize=["T"])
def streams_kernel(
    y_ptr,
    dy_ptr,
    du_ptr,
    d_z_ptr,
    k_ptr,
    h_pre_ptr,
    weights_ptr,
    x_ptr,
    f_ptr,
    f_bias_ptr,
    h_post_ptr,
    h_res_ptr,
    dx_ptr,
    df_ptr,
    d_mixing_ptr,
    d_f_bias_ptr,
    T,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    PART: tl.constexpr,
    TERMS: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_DU: tl.constexpr,
    COMBINE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MIXING: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """One block of channels and every so-many-th tile of tokens: dY, then dx = dY or (COMBINE)
    dx = H_res^T dY.

    y, dy, x, dx [T, N, C]; du, f, df [T, C]; weights [TERMS, R, N*C]. Partial sums: d_mixing
    [channel blocks, T, N + N*N] of d_h_post and d_h_res; d_f_bias [programs a block, C]. A product
    with phi takes PART of its rows.
    """
    PARTS: tl.constexpr = (ROWS + PART - 1) // PART
    block = tl.program_id(0)
    part = tl.program_id(1)
    c = block * BC + tl.arange(0, BC)
    c_mask = c < C
    row = tl.arange(0, PART)
    first = part * BT
    jump = tl.num_programs(1) * BT

    weights = ()
    if PROJECT:
        for i in tl.static_range(N):
            for p in tl.static_range(PARTS):
                w = weights_ptr + (p * PART + row)[:, None] * (N * C) + (i * C + c)[None, :]
                weights = weights + (tl.trans(tl.load(w, c_mask[None, :], 0.0)),)  # [BC, PART]
                if TERMS > 1:
                    low = tl.load(w + R * N * C, c_mask[None, :], 0.0)
                    weights = weights + (tl.trans(low),)
    d_f_bias = tl.zeros((BT, BC), tl.float32)
    if HAS_BIAS:
        f_bias = tl.load(f_bias_ptr + c, c_mask, 0.0).to(tl.float32)

    t = first + tl.arange(0, BT)
    mask = (t < T)[:, None] & c_mask[None, :]
    tiles = load_tiles(
        dy_ptr,
        y_ptr,
        x_ptr,
        du_ptr,
        f_ptr,
        t.to(tl.int64),
        c,
        mask,
        N,
        C,
        HAS_DY,
        PROJECT,
        HAS_DU,
        COMBINE,
    )
    for t0 in range(first, T, jump):
        t = t0 + tl.arange(0, BT)
        t64 = t.to(tl.int64)
        t_mask = t < T
        mask = t_mask[:, None] & c_mask[None, :]
        narrow = t64[:, None] * C + c[None, :]
        offsets = t64[:, None] * (N * C) + c[None, :]
        if PROJECT:
            k = tl.load(k_ptr + t64, t_mask, 0.0)[:, None]
        if HAS_DU:
            h_pre = load_columns(h_pre_ptr, t64, t_mask, N)
        if COMBINE:
            h_post = load_columns(h_post_ptr, t64, t_mask, N)
            h_res = load_columns(h_res_ptr, t64, t_mask, N * N)
        if PROJECT:
            # [BC, BT]: the channels are M, and dY keeps the layout of its load
            d_zs = ()
            for p in tl.static_range(PARTS):
                z_row = (p * PART + row)[None, :]
                z_mask = t_mask[:, None] & (z_row < ROWS)
                d_z = tl.load(d_z_ptr + t64[:, None] * ROWS + z_row, z_mask, 0.0)  # [BT, PART]
                if TERMS == 1:
                    d_zs = d_zs + (d_z,)
                else:
                    high = d_z.to(tl.bfloat16)
                    d_zs = d_zs + (high, (d_z - high.to(tl.float32)).to(tl.bfloat16))
            through = ()
            for i in tl.static_range(N):
                projected = tl.zeros((BC, BT), tl.float32)
                for p in tl.static_range(PARTS):
                    if TERMS == 1:
                        projected = tl.dot(
                            weights[i * PARTS + p],
                            tl.trans(d_zs[p]),
                            projected,
                            input_precision="tf32x3",
                        )
                    else:  # two bf16 terms a factor; low times low is below fp32's last bits
                        projected = product(
                            weights[2 * (i * PARTS + p)], tl.trans(d_zs[2 * p]), projected
                        )
                        projected = product(
                            weights[2 * (i * PARTS + p)], tl.trans(d_zs[2 * p + 1]), projected
                        )
                        projected = product(
                            weights[2 * (i * PARTS + p) + 1], tl.trans(d_zs[2 * p]), projected
                        )
                through = through + (projected,)

        # the next tiles, while this one is worked on; loads that follow the products decide the
        # layout of all that follows
        dys, ys, xs, du, f = tiles
        t_next = t + jump
        tiles = load_tiles(
            dy_ptr,
            y_ptr,
            x_ptr,
            du_ptr,
            f_ptr,
            t_next.to(tl.int64),
            c,
            (t_next < T)[:, None] & c_mask[None, :],
            N,
            C,
            HAS_DY,
            PROJECT,
            HAS_DU,
            COMBINE,
        )

        if HAS_DU:
            du32 = widened(du[0])
        streams_dy = ()
        for i in tl.static_range(N):
            if HAS_DY:
                dy = widened(dys[i])
            else:
                dy = tl.zeros((BT, BC), tl.float32)
            if HAS_DU:
                dy = tl.fma(h_pre[i][:, None], du32, dy)
            if PROJECT:
                dy = tl.fma(k, widened(ys[i]), dy)
                dy += tl.trans(through[i])
            streams_dy = streams_dy + (dy,)

        if COMBINE:
            f = widened(f[0])
            if HAS_BIAS:
                f += f_bias[None, :]
            # the sums of a token side by side, for one store: a store of each would cost a barrier
            entry = tl.arange(0, MIXING)[None, :]
            d_mixing = tl.zeros((BT, MIXING), tl.float32)
            df = tl.zeros((BT, BC), tl.float32)
            products = ()
            for i in tl.static_range(N):
                df = tl.fma(h_post[i][:, None], streams_dy[i], df)
                products = products + (streams_dy[i] * f,)
            sums = row_sums(products, N)
            for i in tl.static_range(N):
                d_mixing = tl.where(entry == i, sums[i][:, None], d_mixing)
            tl.store(df_ptr + narrow, rounded(df, df_ptr.dtype.element_ty), mask)
            if HAS_BIAS:
                d_f_bias += df
            for j in tl.static_range(N):
                x = widened(xs[j])
                dx = tl.zeros((BT, BC), tl.float32)
                products = ()
                for i in tl.static_range(N):
                    dx = tl.fma(h_res[i * N + j][:, None], streams_dy[i], dx)
                    products = products + (streams_dy[i] * x,)
                sums = row_sums(products, N)
                for i in tl.static_range(N):
                    d_mixing = tl.where(entry == N + i * N + j, sums[i][:, None], d_mixing)
                tl.store(dx_ptr + offsets + j * C, rounded(dx, dx_ptr.dtype.element_ty), mask)
            out = (block * T.to(tl.int64) + t64)[:, None] * (N + N * N) + entry
            tl.store(d_mixing_ptr + out, d_mixing, t_mask[:, None] & (entry < N + N * N))
        else:
            for i in tl.static_range(N):
                dx = rounded(streams_dy[i], dx_ptr.dtype.element_ty)
                tl.store(dx_ptr + offsets + i * C, dx, mask)

    if HAS_BIAS:
        tl.store(d_f_bias_ptr + part * C + c, tl.sum(d_f_bias, axis=0), c_mask)


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
    """Launch `streams_kernel`.

    Args:
        y: [T, n, C], the streams that were projected (any tensor of that shape without phi).
        dy, du: gradients of y and u; an absent one is zero.
        phi, token: the projection and what `coefficients_gradients` returned, or None where
            nothing was projected.
        x, mixing: the arguments of the combine that made y, or None: dx is dY.
    """
    tokens, n, width = y.shape
    tile = tiles.streams_backward(n, width, y.dtype)
    blocks = triton.cdiv(width, tile.channels)
    f, h_post, h_res, f_bias = mixing if mixing is not None else (None,) * 4
    rows = n if phi is None else phi.shape[0]
    new = lambda *shape: y.new_empty(*shape, dtype=torch.float32)  # noqa: E731
    weights = None if phi is None else pack_weights(phi, y.dtype)
    d_f_bias = None if f_bias is None else new(tile.splits, width)
    d_mixing = None if mixing is None else new(blocks, tokens, n + n * n)
    dx = torch.empty_like(y)
    df = None if f is None else torch.empty_like(f)
    d_post = None if h_post is None else torch.empty_like(h_post)
    d_res = None if h_res is None else torch.empty_like(h_res)
    if tokens == 0:
        no_phi = None if phi is None else torch.zeros_like(phi)
        no_bias = None if f_bias is None else torch.zeros_like(f_bias)
        return StreamsGradients(dx, df, d_post, d_res, no_bias, no_phi)
    launch(
        streams_kernel,
        (blocks, tile.splits),
        y,
        dense(dy),
        dense(du),
        None if token is None else token.d_z,
        None if token is None else token.k,
        None if token is None else token.h_pre,
        weights,
        x,
        f,
        f_bias,
        h_post,
        h_res,
        dx,
        df,
        d_mixing,
        d_f_bias,
        tokens,
        N=n,
        C=width,
        ROWS=rows,
        R=tiles.padded(rows),
        PART=tiles.streams_backward_rows(rows),
        TERMS=1 if weights is None else weights.shape[0],
        PROJECT=phi is not None,
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
    if d_mixing is not None:
        launch(
            sum_mixing_kernel,
            (triton.cdiv(tokens * (n + n * n), 128),),
            d_mixing,
            d_post,
            d_res,
            tokens,
            N=n,
            BLOCKS=blocks,
            BB=16,
            BW=128,
            num_warps=4,
        )
    if d_f_bias is not None:
        d_f_bias = sum_rows(d_f_bias, new(width)).to(f_bias.dtype)
    d_phi = None if phi is None else phi_gradient(y, token.d_z)
    return StreamsGradients(dx, df, d_post, d_res, d_f_bias, d_phi)
