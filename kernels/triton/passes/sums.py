"""Partial sums of the backward, added up in a fixed order, all of a site in one launch: no atomics.

Nobody in the backward of a site waits for them. So one kernel behind the others has programs for
each kind, side by side; a small kernel of its own for each would leave the GPU idle in between.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..launch import Launch, prepared

ELEMENTS = 4096
"""That a program adds up at a time in columns of few rows or many."""
COLUMNS, ITEMS = 256, 128
"""Of d_phi and d_f_bias, of d_mixing: what a program makes."""


class Rows(NamedTuple):
    """`partial` [count, ...] to be added up into `out`, and what follows into `rest`."""

    partial: Tensor
    out: Tensor
    rest: Tensor | None = None


class Mixings(NamedTuple):
    """`partial` [blocks, T, n + n*n] of d_h_post and d_h_res; n columns more with a d_pre."""

    partial: Tensor
    d_post: Tensor
    d_res: Tensor
    d_pre: Tensor | None = None


@triton.jit
def sum_rows(
    in_ptr,
    out_ptr,
    rest_ptr,
    program,
    COUNT,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,
):
    """Block `program` of BW columns of the sum of COUNT rows of in [COUNT, WIDTH]: out [FIRST],
    then rest."""
    column = program * BW + tl.arange(0, BW)
    total = tl.zeros((BR, BW), tl.float32)
    for first in range(0, COUNT, BR):
        row = first + tl.arange(0, BR)
        mask = (row < COUNT)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(in_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask, 0.0)
    result = tl.sum(total, axis=0)
    tl.store(out_ptr + column, result, column < FIRST)
    if FIRST < WIDTH:
        tl.store(rest_ptr + column - FIRST, result, (column >= FIRST) & (column < WIDTH))


@triton.jit
def sum_mixings(
    in_ptr,
    d_post_ptr,
    d_res_ptr,
    d_pre_ptr,
    program,
    T,
    N: tl.constexpr,
    HAS_PRE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BB: tl.constexpr,
    BW: tl.constexpr,
):
    """BW items of d_mixing [BLOCKS, T, N + N*N] over channel blocks -> d_h_post [T, N], d_h_res;
    with HAS_PRE there are N columns more, for d_h_pre [T, N]."""
    WIDTH: tl.constexpr = N + N * N + (N if HAS_PRE else 0)
    item = program.to(tl.int64) * BW + tl.arange(0, BW)
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
    is_res = (entry >= N) & (entry < N + N * N)
    tl.store(d_res_ptr + t * (N * N) + entry - N, result, (item < count) & is_res)
    if HAS_PRE:
        last = entry - (N + N * N)
        tl.store(d_pre_ptr + t * N + last, result, (item < count) & (last >= 0))


@triton.jit(do_not_specialize=["T", "PHI_COUNT", "BIAS_COUNT", "TOKEN_COUNT"])
def add_up_kernel(
    phi_ptr,
    d_phi_ptr,
    f_bias_ptr,
    d_f_bias_ptr,
    token_ptr,
    d_bias_ptr,
    d_alpha_ptr,
    mixing_ptr,
    d_post_ptr,
    d_res_ptr,
    d_pre_ptr,
    T,
    PHI_COUNT,
    BIAS_COUNT,
    TOKEN_COUNT,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    PARAMETERS: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PRE: tl.constexpr,
    SMALL: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,
    BI: tl.constexpr,
):
    """The programs of d_phi [WIDTH] first; then, where there are any, those of d_f_bias [C], the
    one of d_bias [ROWS] and d_alpha (PARAMETERS in all, in SMALL columns), those of d_mixing.
    """
    OF_PHI: tl.constexpr = (WIDTH + BW - 1) // BW
    OF_BIAS: tl.constexpr = (C + BW - 1) // BW if HAS_BIAS else 0
    OF_TOKENS: tl.constexpr = 1 if PARAMETERS else 0
    program = tl.program_id(0)
    if program < OF_PHI:
        sum_rows(phi_ptr, d_phi_ptr, d_phi_ptr, program, PHI_COUNT, WIDTH, WIDTH, BR, BW)
    program -= OF_PHI
    if HAS_BIAS:
        if (program >= 0) & (program < OF_BIAS):
            sum_rows(f_bias_ptr, d_f_bias_ptr, d_f_bias_ptr, program, BIAS_COUNT, C, C, BR, BW)
        program -= OF_BIAS
    if PARAMETERS:
        if program == 0:
            BR_SMALL: tl.constexpr = BR * BW // SMALL
            sum_rows(
                token_ptr, d_bias_ptr, d_alpha_ptr, program, TOKEN_COUNT, PARAMETERS, ROWS,
                BR_SMALL, SMALL,
            )  # fmt: skip
        program -= OF_TOKENS
    if BLOCKS:  # a constant, and a number that is none  # noqa: SIM102
        if program >= 0:
            sum_mixings(
                mixing_ptr, d_post_ptr, d_res_ptr, d_pre_ptr, program, T, N, HAS_PRE, BLOCKS,
                BR, BI,
            )  # fmt: skip


@prepared
def _launch(
    device: torch.device,
    n: int,
    width: int,
    columns: int,
    parameters: tuple[int, int],
    blocks: int,
    has_pre: bool,
) -> tuple[Launch, int]:
    """`add_up_kernel`, and its programs without those of d_mixing.

    Args:
        width: of d_phi, flat. columns: of d_f_bias; 0 where there is none.
        parameters: of d_bias, and all. blocks: of d_mixing; 0 where there is none.
    """
    launch = Launch(
        add_up_kernel,
        device,
        N=n,
        WIDTH=width,
        C=columns,
        ROWS=parameters[0],
        PARAMETERS=parameters[1],
        BLOCKS=blocks,
        HAS_BIAS=columns > 0,
        HAS_PRE=has_pre,
        SMALL=triton.next_power_of_2(max(parameters[1], 32)),
        BR=ELEMENTS // COLUMNS,
        BW=COLUMNS,
        BI=ITEMS,
        num_warps=4,
    )
    return launch, tiles.cdiv(width, COLUMNS) + tiles.cdiv(columns, COLUMNS) + (parameters[1] > 0)


def add_up(
    phi: Rows,
    f_bias: Rows | None = None,
    parameters: Rows | None = None,
    mixings: Mixings | None = None,
) -> None:
    """Add up all partial sums of a site's backward into the tensors beside them.

    Args:
        phi: into d_phi. f_bias: into d_f_bias, fp32. parameters: into d_bias, then d_alpha.
        mixings: into the gradients of the coefficients that the combine read.
    """
    tokens = blocks = items = 0
    n, sizes, has_pre = 1, (0, 0), False
    if parameters is not None:
        sizes = parameters.out.numel(), parameters.partial.shape[1]
    if mixings is not None:
        blocks, tokens, entries = mixings.partial.shape
        n, items, has_pre = mixings.d_post.shape[-1], tokens * entries, mixings.d_pre is not None
    columns = 0 if f_bias is None else f_bias.out.numel()
    launch, programs = _launch(phi.out.device, n, phi.out.numel(), columns, sizes, blocks, has_pre)
    counts = [0 if rows is None else rows.partial.shape[0] for rows in (phi, f_bias, parameters)]
    nothing = (None,) * 4
    tensors = (
        *phi[:2],
        *(f_bias or nothing)[:2],
        *(parameters or nothing)[:3],
        *(mixings or nothing),
    )
    launch((programs + tiles.cdiv(items, ITEMS), 1), tensors, tokens, *counts)
