"""d_phi = d_z^T vec(y): the backward's last pass over the streams.

It is a pass of its own: in the kernel of the streams' gradient, its accumulators would cost more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arguments import Sizes
from .. import tiles
from ..device import product
from ..launch import Launch, prepared
from .sums import Rows

LONGEST_SUM = 4096
"""Tokens that one program adds up at most. The matrix units seem to cut sums off towards zero, and
that error grows with the sum (docs/measured-facts.md)."""


@triton.jit(do_not_specialize=["T"])
def phi_gradient_kernel(
    y_ptr,
    d_z_ptr,
    d_phi_ptr,
    T,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """d_phi [programs a block, ROWS, N*C] = d_z^T vec(y): one block of the N*C columns and every
    P-th tile of tokens, P = programs a block, from the last tile to the first."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    part = tl.program_id(1)
    row = tl.arange(0, R)
    parts = tl.num_programs(1)
    last_tile = tl.cdiv(T, BT) - 1 - part
    d_phi = tl.zeros((BC, R), tl.float32)
    for i in tl.range(0, tl.cdiv(last_tile + 1, parts), num_stages=STAGES):
        t = (last_tile - i * parts) * BT + tl.arange(0, BT)
        t64 = t.to(tl.int64)
        mask = (t < T)[:, None] & (column < WIDTH)[None, :]
        y = tl.load(y_ptr + t64[:, None] * WIDTH + column[None, :], mask, 0.0)
        z_mask = (t < T)[:, None] & (row < ROWS)[None, :]
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


@prepared
def _launch(
    device: torch.device, dtype: torch.dtype, n: int, width: int, rows: int
) -> tuple[Launch, tiles.Tile]:
    """The kernel for streams of this dtype."""
    tile = tiles.phi_gradient(n, width, dtype)
    launch = Launch(
        phi_gradient_kernel,
        device,
        WIDTH=n * width,
        ROWS=rows,
        R=tiles.padded(rows),
        TERMS=tiles.terms(dtype),
        BT=tile.tokens,
        BC=tile.channels,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return launch, tile


def phi_gradient(sizes: Sizes, y: Tensor, d_z: Tensor, rows: int) -> Rows:
    """d_phi [rows, n*C] of streams y and d_z [T, rows] (at the start of what is given), still to be
    added up."""
    tokens, n, width = sizes
    launch, tile = _launch(y.device, y.dtype, n, width, rows)
    splits = max(tile.splits, tiles.cdiv(tokens, LONGEST_SUM))
    splits = max(1, min(splits, tiles.cdiv(tokens, tile.tokens)))  # none without tokens
    columns = n * width
    partial, d_phi = d_z.new_empty(splits, rows, columns), d_z.new_empty(rows, columns)
    launch((tiles.cdiv(columns, tile.channels), splits), (y, d_z, partial), tokens)
    return Rows(partial, d_phi)
