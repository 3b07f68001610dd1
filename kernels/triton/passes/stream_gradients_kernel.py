"""The kernel of `stream_gradients`: dY on chip, and what a combine makes of it.

`coefficient_gradients_kernel` goes from the last tokens to the first, `stream_gradients_kernel`
back, `phi_gradient_kernel` to the first again: each starts with what the one before read last. All
programs of a kernel work side by side, on neighbouring tokens.
"""

# ruff: noqa: RUF005, SIM108 (Triton's language has no starred tuples)

import triton
import triton.language as tl

from ..device import (
    after_rows,
    load_columns,
    load_streams,
    mixed_stream,
    rounded,
    row_sums,
    to_fp32,
)
from .through_phi import load_weights, through_phi


@triton.jit
def load_tiles(
    pointers,
    t64,
    c,
    mask,
    N: tl.constexpr,
    C: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_DU: tl.constexpr,
    COMBINE: tl.constexpr,
):
    """The tiles [BT, BC] of dy, y, x (N each), du and f, each a tuple; an absent one is empty."""
    dy_ptr, y_ptr, x_ptr, du_ptr, f_ptr = pointers
    narrow = t64[:, None] * C + c[None, :]
    offsets = t64[:, None] * (N * C) + c[None, :]
    dys, ys, xs, du, f = (), (), (), (), ()
    if HAS_DY:
        dys = load_streams(dy_ptr, offsets, mask, C, N)
    if HAS_Y:
        ys = load_streams(y_ptr, offsets, mask, C, N)
    if COMBINE:
        xs = load_streams(x_ptr, offsets, mask, C, N)
        f = (tl.load(f_ptr + narrow, mask, 0.0),)
    if HAS_DU:
        du = (tl.load(du_ptr + narrow, mask, 0.0),)
    return dys, ys, xs, du, f


@triton.jit
def mixed_again(xs, f, h_res, h_post, dtype: tl.constexpr, N: tl.constexpr):
    """The tiles of y that the forward mixed and rounded, from those of x and f (fp32)."""
    wide, ys = (), ()
    for j in tl.static_range(N):
        wide = wide + (to_fp32(xs[j]),)
    for i in tl.static_range(N):
        ys = ys + (rounded(mixed_stream(wide, f, h_res, h_post, i, N), dtype),)
    return ys


@triton.jit
def through_read(
    ys, du, d_mixing, N: tl.constexpr, HAS_DU: tl.constexpr, MIXING_WIDTH: tl.constexpr
):
    """d_mixing with d_h_pre = <du, y_j> behind the rest; zeros where there is no du."""
    if HAS_DU:
        entry = tl.arange(0, MIXING_WIDTH)[None, :]
        du32, products = to_fp32(du[0]), ()
        for j in tl.static_range(N):
            products = products + (du32 * to_fp32(ys[j]),)
        sums = row_sums(products, N)
        for j in tl.static_range(N):
            d_mixing = tl.where(entry == N + N * N + j, sums[j][:, None], d_mixing)
    return d_mixing


@triton.jit
def add_gradients(
    dys,
    ys,
    du,
    h_pre,
    k,
    through,
    N: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_DU: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """dY = dy + h_pre^T du + k y + d_z phi, a tile [BT, BC] a stream."""
    if HAS_DU:
        du32 = to_fp32(du[0])
    streams_dy = ()
    for i in tl.static_range(N):
        if HAS_DY:
            dy = to_fp32(dys[i])
        else:
            dy = tl.zeros((BT, BC), tl.float32)
        if HAS_DU:
            dy = tl.fma(h_pre[i][:, None], du32, dy)
        dy = tl.fma(k, to_fp32(ys[i]), dy)
        dy += tl.trans(through[i])
        streams_dy = streams_dy + (dy,)
    return streams_dy


@triton.jit
def through_post(
    streams_dy,
    f,
    h_post,
    N: tl.constexpr,
    MIXING_WIDTH: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """df = H_post dY; and d_h_post, in the first of MIXING_WIDTH columns.

    The sums of a token stand side by side, for one store: a store of each would cost a barrier.
    """
    entry = tl.arange(0, MIXING_WIDTH)[None, :]
    d_mixing = tl.zeros((BT, MIXING_WIDTH), tl.float32)
    df = tl.zeros((BT, BC), tl.float32)
    products = ()
    for i in tl.static_range(N):
        df = tl.fma(h_post[i][:, None], streams_dy[i], df)
        products = products + (streams_dy[i] * f,)
    sums = row_sums(products, N)
    for i in tl.static_range(N):
        d_mixing = tl.where(entry == i, sums[i][:, None], d_mixing)
    return df, d_mixing


@triton.jit
def through_res(
    streams_dy,
    xs,
    h_res,
    d_mixing,
    dx_ptr,
    offsets,
    mask,
    N: tl.constexpr,
    C: tl.constexpr,
    MIXING_WIDTH: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Store dx = H_res^T dY; return d_mixing with d_h_res behind d_h_post."""
    entry = tl.arange(0, MIXING_WIDTH)[None, :]
    for j in tl.static_range(N):
        x = to_fp32(xs[j])
        dx = tl.zeros((BT, BC), tl.float32)
        products = ()
        for i in tl.static_range(N):
            dx = tl.fma(h_res[i * N + j][:, None], streams_dy[i], dx)
            products = products + (streams_dy[i] * x,)
        sums = row_sums(products, N)
        for i in tl.static_range(N):
            d_mixing = tl.where(entry == N + i * N + j, sums[i][:, None], d_mixing)
        tl.store(dx_ptr + offsets + j * C, rounded(dx, dx_ptr.dtype.element_ty), mask)
    return d_mixing


@triton.jit(do_not_specialize=["T"])
def stream_gradients_kernel(
    y_ptr,
    dy_ptr,
    du_ptr,
    token_ptr,
    phi_ptr,
    x_ptr,
    f_ptr,
    f_bias_ptr,
    h_post_ptr,
    h_res_ptr,
    read_with_ptr,
    dx_ptr,
    df_ptr,
    d_mixing_ptr,
    d_f_bias_ptr,
    T,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_DU: tl.constexpr,
    COMBINE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    READ: tl.constexpr,
    MIXING_WIDTH: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """dY of one block of channels and every P-th tile of tokens, P = programs a block; then
    dx = dY, or (COMBINE) dx = H_res^T dY, where y is mixed again and not read.

    y, dy, x, dx [T, N, C]; du, f, df [T, C]; phi [ROWS, N*C] fp32; token as
    `coefficient_gradients_kernel` wrote it. Partial sums: d_mixing [channel blocks, T, N + N*N] of
    d_h_post and d_h_res; d_f_bias [programs a block, C]. A product with phi takes PART of its rows.
    READ: h_pre is read_with [T, N], its gradient N more columns of d_mixing.
    """
    HAS_Y: tl.constexpr = not COMBINE
    COLUMNS: tl.constexpr = N + N * N + (N if READ else 0)
    k_ptr = after_rows(token_ptr, T, ROWS)
    if READ:
        h_pre_ptr = read_with_ptr
    else:
        h_pre_ptr = after_rows(token_ptr, T, ROWS + 1)
    block = tl.program_id(0)
    part = tl.program_id(1)
    c = block * BC + tl.arange(0, BC)
    c_mask = c < C
    first = part * BT
    jump = tl.num_programs(1) * BT

    weights = load_weights(phi_ptr, c, c_mask, N, C, ROWS, PART, TERMS)
    d_f_bias = tl.zeros((BT, BC), tl.float32)
    if HAS_BIAS:
        f_bias = tl.load(f_bias_ptr + c, c_mask, 0.0).to(tl.float32)

    pointers = (dy_ptr, y_ptr, x_ptr, du_ptr, f_ptr)
    t = first + tl.arange(0, BT)
    mask = (t < T)[:, None] & c_mask[None, :]
    tiles = load_tiles(pointers, t.to(tl.int64), c, mask, N, C, HAS_DY, HAS_Y, HAS_DU, COMBINE)
    for t0 in range(first, T, jump):
        t = t0 + tl.arange(0, BT)
        t64 = t.to(tl.int64)
        t_mask = t < T
        mask = t_mask[:, None] & c_mask[None, :]
        narrow = t64[:, None] * C + c[None, :]
        offsets = t64[:, None] * (N * C) + c[None, :]
        k, h_pre = tl.load(k_ptr + t64, t_mask, 0.0)[:, None], ()
        if HAS_DU:
            h_pre = load_columns(h_pre_ptr, t64, t_mask, N)
        if COMBINE:
            h_post = load_columns(h_post_ptr, t64, t_mask, N)
            h_res = load_columns(h_res_ptr, t64, t_mask, N * N)
        through = through_phi(weights, token_ptr, t64, t_mask, N, ROWS, PART, TERMS, BT, BC)

        # The next tiles are loaded while this one is worked on, and before what follows: loads
        # behind the products above decide the layout of all of it.
        dys, ys, xs, du, f = tiles
        t_next = t + jump
        next_mask = (t_next < T)[:, None] & c_mask[None, :]
        tiles = load_tiles(
            pointers, t_next.to(tl.int64), c, next_mask, N, C, HAS_DY, HAS_Y, HAS_DU, COMBINE
        )
        if COMBINE:
            f = to_fp32(f[0])
            if HAS_BIAS:
                f += f_bias[None, :]
            ys = mixed_again(xs, f, h_res, h_post, dx_ptr.dtype.element_ty, N)

        streams_dy = add_gradients(dys, ys, du, h_pre, k, through, N, HAS_DY, HAS_DU, BT, BC)
        if COMBINE:
            df, d_mixing = through_post(streams_dy, f, h_post, N, MIXING_WIDTH, BT, BC)
            tl.store(df_ptr + narrow, rounded(df, df_ptr.dtype.element_ty), mask)
            if HAS_BIAS:
                d_f_bias += df
            d_mixing = through_res(
                streams_dy, xs, h_res, d_mixing, dx_ptr, offsets, mask, N, C, MIXING_WIDTH, BT, BC
            )
            if READ:
                d_mixing = through_read(ys, du, d_mixing, N, HAS_DU, MIXING_WIDTH)
            entry = tl.arange(0, MIXING_WIDTH)[None, :]
            out = (block * T.to(tl.int64) + t64)[:, None] * COLUMNS + entry
            tl.store(d_mixing_ptr + out, d_mixing, t_mask[:, None] & (entry < COLUMNS))
        else:
            for i in tl.static_range(N):
                dx = rounded(streams_dy[i], dx_ptr.dtype.element_ty)
                tl.store(dx_ptr + offsets + i * C, dx, mask)

    if HAS_BIAS:
        tl.store(d_f_bias_ptr + part * C + c, tl.sum(d_f_bias, axis=0), c_mask)
