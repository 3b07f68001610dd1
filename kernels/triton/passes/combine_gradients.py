"""The backward of a combine alone, one kernel over the streams and nothing behind it.

A program takes a few tokens through all of their channels. It keeps the products of a token apart,
channel by channel of a block, until it has seen all blocks, and adds them up once: the sums over
channels cost as much as a block's reads, so one for every block would be held by them.
"""

# ruff: noqa: RUF005 (Triton's language has no starred tuples)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arguments import Mixing, Sizes
from .. import tiles
from ..device import load_columns, load_streams, rounded, row_sums, to_fp32
from ..launch import Launch, prepared
from .stream_gradients import StreamGradients


@triton.jit
def load_block(pointers, t64, c, mask, N: tl.constexpr, C: tl.constexpr):
    """The tiles [BT, BC] of dy and x, N each, and of f."""
    dy_ptr, x_ptr, f_ptr = pointers
    wide = t64[:, None] * (N * C) + c[None, :]
    dys = load_streams(dy_ptr, wide, mask, C, N)
    xs = load_streams(x_ptr, wide, mask, C, N)
    return dys, xs, tl.load(f_ptr + t64[:, None] * C + c[None, :], mask, 0.0)


@triton.jit
def zeros(COUNT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """COUNT tiles [BT, BC] to add to."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((BT, BC), tl.float32),)
    return tiles


@triton.jit
def weighted(streams, weights, first: tl.constexpr, step: tl.constexpr, N: tl.constexpr):
    """The sum over i of weights[first + i step] streams[i], one chain of fused multiply-adds."""
    total = weights[first][:, None] * streams[0]
    for i in tl.static_range(1, N):
        total = tl.fma(weights[first + i * step][:, None], streams[i], total)
    return total


@triton.jit
def store_sums(ptr, products, t64, t_mask, COUNT: tl.constexpr, BT: tl.constexpr):
    """Add up COUNT tiles [BT, BC] over channels -> [T, COUNT], by one store: one of each column
    would cost a barrier."""
    WIDTH: tl.constexpr = triton.next_power_of_2(COUNT)
    entry = tl.arange(0, WIDTH)[None, :]
    sums, row = row_sums(products, COUNT), tl.zeros((BT, WIDTH), tl.float32)
    for i in tl.static_range(COUNT):
        row = tl.where(entry == i, sums[i][:, None], row)
    tl.store(ptr + t64[:, None] * COUNT + entry, row, t_mask[:, None] & (entry < COUNT))


@triton.jit(do_not_specialize=["T"])
def combine_gradients_kernel(
    dy_ptr,
    x_ptr,
    f_ptr,
    f_bias_ptr,
    h_post_ptr,
    h_res_ptr,
    dx_ptr,
    df_ptr,
    d_post_ptr,
    d_res_ptr,
    d_f_bias_ptr,
    T,
    N: tl.constexpr,
    C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """df = H_post dy and dx = H_res^T dy; d_h_post = <dy_i, f>, d_h_res = <dy_i, x_j>.

    dy, x, dx [T, N, C]; f, df [T, C]; h_post, d_post [T, N] and h_res, d_res [T, N, N] fp32;
    d_f_bias [programs, C]: sums of df over a program's tokens.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    t64, t_mask = t.to(tl.int64), t < T
    h_post = load_columns(h_post_ptr, t64, t_mask, N)
    h_res = load_columns(h_res_ptr, t64, t_mask, N * N)
    posts, mixed = zeros(N, BT, BC), zeros(N * N, BT, BC)

    pointers = (dy_ptr, x_ptr, f_ptr)
    c = tl.arange(0, BC)
    ahead = load_block(pointers, t64, c, t_mask[:, None] & (c < C)[None, :], N, C)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        mask = t_mask[:, None] & (c < C)[None, :]
        dys, xs, f = ahead
        # before this block's stores, which may alias loads behind them
        after = c + BC
        ahead = load_block(pointers, t64, after, t_mask[:, None] & (after < C)[None, :], N, C)
        f = to_fp32(f)
        if HAS_BIAS:
            f += tl.load(f_bias_ptr + c, c < C, 0.0).to(tl.float32)[None, :]
        wide_dys, new_posts, new_mixed = (), (), ()
        for i in tl.static_range(N):
            wide_dys = wide_dys + (to_fp32(dys[i]),)
            new_posts = new_posts + (tl.fma(wide_dys[i], f, posts[i]),)
        narrow = t64[:, None] * C + c[None, :]
        df = weighted(wide_dys, h_post, 0, 1, N)
        tl.store(df_ptr + narrow, rounded(df, df_ptr.dtype.element_ty), mask)
        if HAS_BIAS:
            tl.store(
                d_f_bias_ptr + tl.program_id(0).to(tl.int64) * C + c, tl.sum(df, axis=0), c < C
            )
        offsets = t64[:, None] * (N * C) + c[None, :]
        for i in tl.static_range(N):
            for j in tl.static_range(N):
                product = tl.fma(wide_dys[i], to_fp32(xs[j]), mixed[i * N + j])
                new_mixed = new_mixed + (product,)
        for j in tl.static_range(N):
            dx = weighted(wide_dys, h_res, j, N, N)
            tl.store(dx_ptr + offsets + j * C, rounded(dx, dx_ptr.dtype.element_ty), mask)
        posts, mixed = new_posts, new_mixed

    store_sums(d_post_ptr, posts, t64, t_mask, N, BT)
    store_sums(d_res_ptr, mixed, t64, t_mask, N * N, BT)


@prepared
def _launch(
    device: torch.device, dtype: torch.dtype, n: int, width: int, f_bias: torch.dtype | None
) -> tuple[Launch, int]:
    """The kernel for streams of this dtype, and the tokens of a program."""
    tile = tiles.combine_gradients(n, width, dtype)
    launch = Launch(
        combine_gradients_kernel,
        device,
        N=n,
        C=width,
        HAS_BIAS=f_bias is not None,
        BT=tile.tokens,
        BC=tile.channels,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    return launch, tile.tokens


def combine_gradients(sizes: Sizes, x: Tensor, dy: Tensor, mixing: Mixing) -> StreamGradients:
    """Launch `combine_gradients_kernel`; PyTorch adds up what an f_bias gets, two passes more.

    Args:
        x, mixing: the arguments of the combine; dy: the gradient of what it made.
    """
    tokens, n, width = sizes
    f, h_post, h_res, f_bias = mixing
    dx, df = torch.empty_like(x), torch.empty_like(f)
    d_post, d_res = torch.empty_like(h_post), torch.empty_like(h_res)
    d_f_bias = None if f_bias is None else torch.zeros_like(f_bias)
    if tokens:
        bias_dtype = None if f_bias is None else f_bias.dtype
        launch, a_program = _launch(x.device, x.dtype, n, width, bias_dtype)
        programs = tiles.cdiv(tokens, a_program)
        partial = None if f_bias is None else h_post.new_empty(programs, width)
        given = (dy, x, f, f_bias, h_post, h_res, dx, df, d_post, d_res, partial)
        launch((programs, 1), given, tokens)
        if partial is not None:
            d_f_bias = partial.sum(0).to(bias_dtype)
    return StreamGradients(dx, df, d_post, d_res, d_f_bias, None)
