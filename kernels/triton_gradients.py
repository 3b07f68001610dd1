"""The backward: two kernels over the streams, whichever operation asks.

`coefficients_kernel` (B2) goes from the gradients of u, h_post and h_res through Sinkhorn, sigmoid
and the norm to what the streams' gradient needs of a token: d_z [rows], k and h_pre.
`streams_kernel` (B31) builds the whole gradient of the projected streams y on chip,
    dY = dy + h_pre^T du + d_z phi + k y,
and, where y came from a combine, goes through it at once: df = H_post dY, dx = H_res^T dY, written
once. `phi_kernel` reads y once more for d_phi (inside B31 its accumulators cost more). Sums over
tokens or channels are partial sums, added up in a fixed order: no atomics.

The three go through shares of the tokens side by side: B2 from the ends to the starts, B31 back,
`phi_kernel` to the starts again: each starts with what the one before read last.
"""

# ruff: noqa: RUF005, SIM108 (Triton's language has no starred tuples)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_config as config
from .triton_device import (
    load_columns,
    load_streams,
    product,
    row_sums,
    sinkhorn_backward,
)
from .triton_launch import PHI_TERMS, dense, on_device, pack_weights


@triton.jit(do_not_specialize=["T", "share"])
def coefficients_kernel(
    x_ptr,
    du_ptr,
    d_pre_ptr,
    d_post_ptr,
    d_res_ptr,
    normed_ptr,
    inverse_ptr,
    alpha_ptr,
    bias_ptr,
    d_z_ptr,
    k_ptr,
    h_pre_ptr,
    d_parameters_ptr,
    T,
    share,
    pre_eps,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    AGGREGATE: tl.constexpr,
    MIXING: tl.constexpr,
    HAS_POST: tl.constexpr,
    HAS_RES: tl.constexpr,
    ITERATIONS: tl.constexpr,
    SINKHORN_EPS: tl.constexpr,
    SPLITS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradients of u (AGGREGATE) or h_pre, of h_post and of h_res -> a token's d_z, k, h_pre.

    With l = alpha z / r + b and m = z / r: d_z = alpha d_l / r; k = -sum(alpha d_l m) / (r^2 N C),
    the factor of y in the gradient through r. d_parameters [programs, ROWS + 3 (or 1)]:
    sums over this program's tokens of d_l (for bias) and of d_l m (for alpha).
    """
    ALPHAS: tl.constexpr = 3 if MIXING else 1
    program = tl.program_id(0)
    d_bias_ptr = d_parameters_ptr + program * (ROWS + ALPHAS)
    d_alpha_ptr = d_bias_ptr + ROWS
    t_end = program % SPLITS * share + share - program // SPLITS * BT
    t = t_end - BT + tl.arange(0, BT)
    t64 = t.to(tl.int64)
    t_mask = t < T
    inverse = tl.load(inverse_ptr + t64, t_mask, 0.0)

    if AGGREGATE:
        products = ()
        for _ in tl.static_range(N):
            products = products + (tl.zeros((BT, BC), tl.float32),)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            mask = t_mask[:, None] & (c < C)[None, :]
            streams = load_streams(x_ptr, t64[:, None] * (N * C) + c[None, :], mask, C, N)
            du = tl.load(du_ptr + t64[:, None] * C + c[None, :], mask, 0.0).to(tl.float32)
            longer = ()
            for j in tl.static_range(N):
                longer = longer + (tl.fma(streams[j].to(tl.float32), du, products[j]),)
            products = longer

    through_norm = tl.zeros((BT,), tl.float32)  # sum of alpha d_l m
    alpha = tl.load(alpha_ptr)
    d_alpha = tl.zeros((BT,), tl.float32)
    for j in tl.static_range(N):
        if AGGREGATE:
            d_weight = tl.sum(products[j], axis=1)
        else:
            d_weight = tl.load(d_pre_ptr + t64 * N + j, t_mask, 0.0)
        normed = tl.load(normed_ptr + t64 * ROWS + j, t_mask, 0.0)
        weight = tl.sigmoid(tl.fma(normed, alpha, tl.load(bias_ptr + j)))
        tl.store(h_pre_ptr + t64 * N + j, weight + pre_eps, t_mask)
        d_logit = tl.where(t_mask, d_weight * weight * (1.0 - weight), 0.0)
        tl.store(d_z_ptr + t64 * ROWS + j, alpha * d_logit * inverse, t_mask)
        tl.store(d_bias_ptr + j, tl.sum(d_logit, axis=0))
        d_alpha = tl.fma(d_logit, normed, d_alpha)
    through_norm = tl.fma(d_alpha, alpha, through_norm)
    tl.store(d_alpha_ptr, tl.sum(d_alpha, axis=0))

    if MIXING:
        j = tl.arange(0, N)
        offsets = t64[:, None] * ROWS + N + j[None, :]  # [BT, N]
        mask = t_mask[:, None] & (j >= 0)[None, :]
        alpha = tl.load(alpha_ptr + 1)
        normed = tl.load(normed_ptr + offsets, mask, 0.0)
        weight = tl.sigmoid(tl.fma(normed, alpha, tl.load(bias_ptr + N + j)[None, :]))
        d_logits = tl.zeros((BT, N), tl.float32)
        if HAS_POST:
            d_weight = tl.load(d_post_ptr + t64[:, None] * N + j[None, :], mask, 0.0)
            d_logits = 2.0 * d_weight * weight * (1.0 - weight)
        d_logits = tl.where(mask, d_logits, 0.0)
        tl.store(d_z_ptr + offsets, alpha * d_logits * inverse[:, None], mask)
        tl.store(d_bias_ptr + N + j, tl.sum(d_logits, axis=0))
        d_alpha = tl.sum(d_logits * normed, axis=1)
        through_norm = tl.fma(d_alpha, alpha, through_norm)
        tl.store(d_alpha_ptr + 1, tl.sum(d_alpha, axis=0))

        entry = j[:, None] * N + j[None, :]  # [N, N] (dst, src)
        offsets = t64[:, None, None] * ROWS + 2 * N + entry[None, :, :]
        mask = t_mask[:, None, None] & (entry >= 0)[None, :, :]
        alpha = tl.load(alpha_ptr + 2)
        normed = tl.load(normed_ptr + offsets, mask, 0.0)
        d_logits = tl.zeros((BT, N, N), tl.float32)
        if HAS_RES:
            logits = tl.fma(normed, alpha, tl.load(bias_ptr + 2 * N + entry)[None, :, :])
            d_matrix_offsets = t64[:, None, None] * (N * N) + entry[None, :, :]
            d_matrix = tl.load(d_res_ptr + d_matrix_offsets, mask, 0.0)
            d_logits = sinkhorn_backward(logits, d_matrix, ITERATIONS, SINKHORN_EPS)
        d_logits = tl.where(mask, d_logits, 0.0)
        tl.store(d_z_ptr + offsets, alpha * d_logits * inverse[:, None, None], mask)
        tl.store(d_bias_ptr + 2 * N + entry, tl.sum(d_logits, axis=0))
        d_alpha = tl.sum(tl.sum(d_logits * normed, axis=2), axis=1)
        through_norm = tl.fma(d_alpha, alpha, through_norm)
        tl.store(d_alpha_ptr + 2, tl.sum(d_alpha, axis=0))

    tl.store(k_ptr + t64, -through_norm * inverse * inverse / (N * C), t_mask)


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


@triton.jit(do_not_specialize=["T", "share"])
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
    share,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
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
    """One block of channels and `share` tokens: dY, then dx = dY or (COMBINE) dx = H_res^T dY.

    y, dy, x, dx [T, N, C]; du, f, df [T, C]; weights [TERMS, R, N*C]. Partial sums: d_mixing
    [channel blocks, T, N + N*N] of d_h_post and d_h_res; d_f_bias [token shares, C].
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    c = block * BC + tl.arange(0, BC)
    c_mask = c < C
    row = tl.arange(0, R)
    first = part * share
    last = tl.minimum(first + share, T)

    weights = ()
    if PROJECT:
        for i in tl.static_range(N):
            w = weights_ptr + row[:, None] * (N * C) + (i * C + c)[None, :]  # [R, BC]
            weights = weights + (tl.trans(tl.load(w, c_mask[None, :], 0.0)),)
            if TERMS > 1:
                low = tl.load(w + R * N * C, c_mask[None, :], 0.0)
                weights = weights + (tl.trans(low),)
    d_f_bias = tl.zeros((BT, BC), tl.float32)
    if HAS_BIAS:
        f_bias = tl.load(f_bias_ptr + c, c_mask, 0.0).to(tl.float32)

    t = first + tl.arange(0, BT)
    mask = (t < last)[:, None] & c_mask[None, :]
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
    for t0 in range(first, last, BT):
        t = t0 + tl.arange(0, BT)
        t64 = t.to(tl.int64)
        t_mask = t < last
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
            z_mask = t_mask[:, None] & (row < ROWS)[None, :]
            d_z = tl.load(d_z_ptr + t64[:, None] * ROWS + row[None, :], z_mask, 0.0)  # [BT, R]
            if TERMS > 1:
                d_z_high = d_z.to(tl.bfloat16)
                d_z_low = (d_z - d_z_high.to(tl.float32)).to(tl.bfloat16)
            through = ()
            for i in tl.static_range(N):
                projected = tl.zeros((BC, BT), tl.float32)
                if TERMS == 1:
                    projected = tl.dot(
                        weights[i], tl.trans(d_z), projected, input_precision="tf32x3"
                    )
                else:  # two bf16 terms a factor; low times low is below fp32's last bits
                    projected = product(weights[2 * i], tl.trans(d_z_high), projected)
                    projected = product(weights[2 * i], tl.trans(d_z_low), projected)
                    projected = product(weights[2 * i + 1], tl.trans(d_z_high), projected)
                through = through + (projected,)

        # the next tiles, while this one is worked on; loads that follow the products decide the
        # layout of all that follows
        dys, ys, xs, du, f = tiles
        t_next = t + BT
        tiles = load_tiles(
            dy_ptr,
            y_ptr,
            x_ptr,
            du_ptr,
            f_ptr,
            t_next.to(tl.int64),
            c,
            (t_next < last)[:, None] & c_mask[None, :],
            N,
            C,
            HAS_DY,
            PROJECT,
            HAS_DU,
            COMBINE,
        )

        streams_dy = ()
        for i in tl.static_range(N):
            if HAS_DY:
                dy = dys[i].to(tl.float32)
            else:
                dy = tl.zeros((BT, BC), tl.float32)
            if HAS_DU:
                dy = tl.fma(h_pre[i][:, None], du[0].to(tl.float32), dy)
            if PROJECT:
                dy = tl.fma(k, ys[i].to(tl.float32), dy)
                dy += tl.trans(through[i])
            streams_dy = streams_dy + (dy,)

        if COMBINE:
            f = f[0].to(tl.float32)
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
            tl.store(df_ptr + narrow, df.to(df_ptr.dtype.element_ty), mask)
            if HAS_BIAS:
                d_f_bias += df
            for j in tl.static_range(N):
                x = xs[j].to(tl.float32)
                dx = tl.zeros((BT, BC), tl.float32)
                products = ()
                for i in tl.static_range(N):
                    dx = tl.fma(h_res[i * N + j][:, None], streams_dy[i], dx)
                    products = products + (streams_dy[i] * x,)
                sums = row_sums(products, N)
                for i in tl.static_range(N):
                    d_mixing = tl.where(entry == N + i * N + j, sums[i][:, None], d_mixing)
                tl.store(dx_ptr + offsets + j * C, dx.to(dx_ptr.dtype.element_ty), mask)
            out = (block * T.to(tl.int64) + t64)[:, None] * (N + N * N) + entry
            tl.store(d_mixing_ptr + out, d_mixing, t_mask[:, None] & (entry < N + N * N))
        else:
            for i in tl.static_range(N):
                dx = streams_dy[i].to(dx_ptr.dtype.element_ty)
                tl.store(dx_ptr + offsets + i * C, dx, mask)

    if HAS_BIAS:
        tl.store(d_f_bias_ptr + part * C + c, tl.sum(d_f_bias, axis=0), c_mask)


@triton.jit(do_not_specialize=["T", "share"])
def phi_kernel(
    y_ptr,
    d_z_ptr,
    d_phi_ptr,
    T,
    share,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """d_phi [token shares, ROWS, N*C] = d_z^T vec(y), one block of the N*C columns a program."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    part = tl.program_id(1)
    row = tl.arange(0, R)
    first = part * share
    last = tl.minimum(first + share, T)
    d_phi = tl.zeros((BC, R), tl.float32)
    count = tl.cdiv(tl.maximum(last - first, 0), BT)
    for i in tl.range(0, count, num_stages=STAGES):
        t = first + (count - 1 - i) * BT + tl.arange(0, BT)
        t64 = t.to(tl.int64)
        mask = (t < last)[:, None] & (column < WIDTH)[None, :]
        y = tl.load(y_ptr + t64[:, None] * WIDTH + column[None, :], mask, 0.0)
        z_mask = (t < last)[:, None] & (row < ROWS)[None, :]
        d_z = tl.load(d_z_ptr + t64[:, None] * ROWS + row[None, :], z_mask, 0.0)  # [BT, R]
        if TERMS == 1:
            d_phi = tl.dot(tl.trans(y.to(tl.float32)), d_z, d_phi, input_precision="tf32x3")
        else:
            for _ in tl.static_range(TERMS):  # d_z as a sum of bf16 terms, 8 bits each
                term = d_z.to(tl.bfloat16)
                d_phi = product(tl.trans(y), term, d_phi)
                d_z -= term.to(tl.float32)
    out = (part * ROWS + row)[None, :] * WIDTH + column[:, None]
    tl.store(d_phi_ptr + out, d_phi, (column < WIDTH)[:, None] & (row < ROWS)[None, :])


@triton.jit(do_not_specialize=["COUNT"])
def sum_rows_kernel(
    in_ptr,
    out_ptr,
    rest_ptr,
    COUNT,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,
):
    """The sum of the COUNT rows of in [COUNT, WIDTH], in a fixed order: out [FIRST], then rest."""
    column = tl.program_id(0) * BW + tl.arange(0, BW)
    total = tl.zeros((BR, BW), tl.float32)
    for first in range(0, COUNT, BR):
        row = first + tl.arange(0, BR)
        mask = (row < COUNT)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(in_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask, 0.0)
    result = tl.sum(total, axis=0)
    tl.store(out_ptr + column, result, column < FIRST)
    if FIRST < WIDTH:
        tl.store(rest_ptr + column - FIRST, result, (column >= FIRST) & (column < WIDTH))


@triton.jit(do_not_specialize=["T"])
def sum_mixing_kernel(
    in_ptr,
    d_post_ptr,
    d_res_ptr,
    T,
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    BB: tl.constexpr,
    BW: tl.constexpr,
):
    """Add up d_mixing [BLOCKS, T, N + N*N] over channel blocks -> d_h_post [T, N], d_h_res."""
    WIDTH: tl.constexpr = N + N * N
    item = tl.program_id(0).to(tl.int64) * BW + tl.arange(0, BW)
    count = T.to(tl.int64) * WIDTH
    total = tl.zeros((BB, BW), tl.float32)
    for first in range(0, BLOCKS, BB):
        block = first + tl.arange(0, BB)
        mask = (block < BLOCKS)[:, None] & (item < count)[None, :]
        total += tl.load(in_ptr + block.to(tl.int64)[:, None] * count + item[None, :], mask, 0.0)
    result = tl.sum(total, axis=0)
    t = item // WIDTH
    entry = item % WIDTH
    tl.store(d_post_ptr + t * N + entry, result, (item < count) & (entry < N))
    tl.store(d_res_ptr + t * (N * N) + entry - N, result, (item < count) & (entry >= N))


def sum_rows(partial: Tensor, out: Tensor, rest: Tensor | None = None) -> Tensor:
    """The sum over the first dimension of `partial`, into `out` and what follows into `rest`."""
    count = partial.shape[0]
    width = partial[0].numel()
    few = width < 1024  # few columns: many rows a step, else many columns a program
    block_rows, block_columns = (128, 32) if few else (8, 256)
    with on_device(partial):
        sum_rows_kernel[(triton.cdiv(width, block_columns),)](
            partial,
            out,
            rest,
            count,
            WIDTH=width,
            FIRST=out.numel(),
            BR=block_rows,
            BW=block_columns,
            num_warps=8 if few else 4,
        )
    return out


@dataclass(frozen=True)
class TokenGradients:
    """What `coefficients_gradients` returns: d_z [T, rows], k [T], h_pre [T, n], parameters'."""

    d_z: Tensor
    k: Tensor
    h_pre: Tensor
    d_alpha: Tensor
    d_bias: Tensor


def coefficients_gradients(
    y: Tensor,
    normed: Tensor,
    inverse: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    du: Tensor | None = None,
    d_pre: Tensor | None = None,
    d_post: Tensor | None = None,
    d_res: Tensor | None = None,
    iterations: int = 1,
    pre_eps: float,
    sinkhorn_eps: float = 0.0,
) -> TokenGradients:
    """Launch B2. du or d_pre is the gradient of what H_pre became; an absent one is zero."""
    tokens, n, width = y.shape
    rows = normed.shape[1]
    if du is None and d_pre is None:
        d_pre = inverse.new_zeros(tokens, n)
    tile = config.coefficients_backward(n, width, y.dtype)
    splits = config.streams_backward(n, width, y.dtype).splits
    tiles = triton.cdiv(tokens, splits * tile.tokens)  # of each share
    programs = splits * tiles
    d_z, k = torch.empty_like(normed), torch.empty_like(inverse)
    h_pre = inverse.new_empty(tokens, n)
    d_parameters = inverse.new_empty(programs, rows + alpha.numel())
    if tokens == 0:
        zeros = torch.zeros_like
        return TokenGradients(d_z, k, h_pre, zeros(alpha), zeros(bias))
    with on_device(y):
        coefficients_kernel[(programs,)](
            y,
            dense(du),
            dense(d_pre),
            dense(d_post),
            dense(d_res),
            normed,
            inverse,
            alpha,
            bias,
            d_z,
            k,
            h_pre,
            d_parameters,
            tokens,
            tiles * tile.tokens,
            pre_eps,
            N=n,
            C=width,
            ROWS=rows,
            AGGREGATE=du is not None,
            MIXING=rows > n,
            HAS_POST=d_post is not None,
            HAS_RES=d_res is not None,
            ITERATIONS=iterations,
            SINKHORN_EPS=sinkhorn_eps,
            SPLITS=splits,
            BT=tile.tokens,
            BC=tile.channels,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    d_bias, d_alpha = torch.empty_like(bias), torch.empty_like(alpha)
    sum_rows(d_parameters, d_bias, d_alpha)
    return TokenGradients(d_z, k, h_pre, d_alpha, d_bias)


def phi_gradient(y: Tensor, d_z: Tensor) -> Tensor:
    """d_phi [rows, n*C] of y [T, n, C] and d_z [T, rows], in a kernel of its own."""
    tokens, n, width = y.shape
    rows = d_z.shape[1]
    tile = config.phi_gradient(n, width, y.dtype)
    partial = d_z.new_empty(tile.splits, rows, n * width)
    share = triton.cdiv(triton.cdiv(tokens, tile.splits), tile.tokens) * tile.tokens
    with on_device(y):
        phi_kernel[(triton.cdiv(n * width, tile.channels), tile.splits)](
            y,
            d_z,
            partial,
            tokens,
            share,
            WIDTH=n * width,
            ROWS=rows,
            R=config.padded(rows),
            TERMS=PHI_TERMS if y.dtype == torch.bfloat16 else 1,
            BT=tile.tokens,
            BC=tile.channels,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    return sum_rows(partial, partial.new_empty(rows, n * width))


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
    mixing: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None] | None = None,
) -> StreamsGradients:
    """Launch B31.

    Args:
        y: [T, n, C], the streams that were projected (any tensor of that shape without phi).
        dy, du: gradients of y and u; an absent one is zero.
        phi, token: the projection and what B2 returned, or None where nothing was projected.
        mixing: (x, f, h_post, h_res, f_bias) of the combine that made y, or None: dx is dY.
    """
    tokens, n, width = y.shape
    tile = config.streams_backward(n, width, y.dtype)
    blocks = triton.cdiv(width, tile.channels)
    x, f, h_post, h_res, f_bias = mixing if mixing is not None else (None,) * 5
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
    share = triton.cdiv(triton.cdiv(tokens, tile.splits), tile.tokens) * tile.tokens
    with on_device(y):
        streams_kernel[(blocks, tile.splits)](
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
            share,
            N=n,
            C=width,
            ROWS=rows,
            R=config.padded(rows),
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
            maxnreg=tile.registers,
        )
        if d_mixing is not None:
            sum_mixing_kernel[(triton.cdiv(tokens * (n + n * n), 128),)](
                d_mixing, d_post, d_res, tokens, n, blocks, 16, 128, num_warps=4
            )
    if d_f_bias is not None:
        d_f_bias = sum_rows(d_f_bias, new(width)).to(f_bias.dtype)
    d_phi = None if phi is None else phi_gradient(y, token.d_z)
    return StreamsGradients(dx, df, d_post, d_res, d_f_bias, d_phi)
