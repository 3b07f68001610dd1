"""Partial sums of the backward, added up in a fixed order: no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..launch import Launch, prepared


@triton.jit(do_not_specialize=["COUNT"])
def sum_partials_kernel(
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
    d_pre_ptr,
    T,
    N: tl.constexpr,
    HAS_PRE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BB: tl.constexpr,
    BW: tl.constexpr,
):
    """Add up d_mixing [BLOCKS, T, N + N*N] over channel blocks -> d_h_post [T, N], d_h_res; with
    HAS_PRE there are N columns more, for d_h_pre [T, N]."""
    WIDTH: tl.constexpr = N + N * N + (N if HAS_PRE else 0)
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
    if HAS_PRE:
        is_res = (entry >= N) & (entry < N + N * N)
        tl.store(d_res_ptr + t * (N * N) + entry - N, result, (item < count) & is_res)
        last = entry - (N + N * N)
        tl.store(d_pre_ptr + t * N + last, result, (item < count) & (last >= 0))
    else:
        tl.store(d_res_ptr + t * (N * N) + entry - N, result, (item < count) & (entry >= N))


@prepared
def _sum_mixing(device: torch.device, n: int, has_pre: bool, blocks: int) -> Launch:
    sizes = {"N": n, "BLOCKS": blocks, "BB": 16, "BW": 128}
    return Launch(sum_mixing_kernel, device, HAS_PRE=has_pre, **sizes, num_warps=4)


def sum_mixing(partial: Tensor, d_post: Tensor, d_res: Tensor, d_pre: Tensor | None = None) -> None:
    """The sum over the first dimension of `partial` [blocks, T, n + n*n], into the next two; n
    columns more where there is a d_pre, for it."""
    blocks, tokens, width = partial.shape
    launch = _sum_mixing(partial.device, d_post.shape[-1], d_pre is not None, blocks)
    launch((tiles.cdiv(tokens * width, 128), 1), (partial, d_post, d_res, d_pre), tokens)


@prepared
def _sum_rows(device: torch.device, width: int, first: int) -> tuple[int, Launch]:
    """The programs, and `sum_partials_kernel` for rows of this width, `first` of them for `out`."""
    few = width < 1024  # few columns: many rows a step, else many columns a program
    rows, columns = (128, 32) if few else (8, 256)
    sizes = {"WIDTH": width, "FIRST": first, "BR": rows, "BW": columns}
    launch = Launch(sum_partials_kernel, device, **sizes, num_warps=8 if few else 4)
    return tiles.cdiv(width, columns), launch


def sum_partials(partial: Tensor, out: Tensor, rest: Tensor | None = None) -> Tensor:
    """The sum over the first dimension of `partial`, into `out` and what follows into `rest`."""
    first = out.numel()
    width = first if rest is None else first + rest.numel()
    programs, launch = _sum_rows(partial.device, width, first)
    launch((programs, 1), (partial, out, rest), partial.shape[0])
    return out
