"""u = H_pre x: the kernel that makes every u, and `aggregate`'s own gradient."""

# ruff: noqa: RUF005 (Triton's language has no starred tuples)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arguments import Sizes
from .. import tiles
from ..device import load_columns, load_streams
from ..launch import Launch, prepared


@triton.jit(do_not_specialize=["T"])
def aggregate_kernel(
    x_ptr,
    h_pre_ptr,
    u_ptr,
    T,
    N: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """u [T, C] of x [T, N, C] and h_pre [T, N], one tile a program.

    From the last token to the first: the L2 cache may still hold what the kernel before wrote last.
    """
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    c = tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
    t = (tl.cdiv(T, BT) - 1 - tl.program_id(0) // BLOCKS) * BT + tl.arange(0, BT)
    t64 = t.to(tl.int64)
    mask = (t < T)[:, None] & (c < C)[None, :]
    h_pre = load_columns(h_pre_ptr, t64, t < T, N)
    streams = load_streams(x_ptr, t64[:, None] * (N * C) + c[None, :], mask, C, N)
    u = tl.zeros((BT, BC), tl.float32)
    for j in tl.static_range(N):
        u = tl.fma(h_pre[j][:, None], streams[j].to(tl.float32), u)
    tl.store(u_ptr + t64[:, None] * C + c[None, :], u.to(u_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["T"])
def aggregate_backward_kernel(
    x_ptr,
    h_pre_ptr,
    du_ptr,
    dx_ptr,
    d_pre_ptr,
    T,
    N: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """dx = H_pre^T du and d_h_pre = <du, x_j>, whole rows of BT tokens a program."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    t64 = t.to(tl.int64)
    t_mask = t < T
    h_pre = load_columns(h_pre_ptr, t64, t_mask, N)
    d_pre = ()
    for _ in tl.static_range(N):
        d_pre = d_pre + (tl.zeros((BT, BC), tl.float32),)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        mask = t_mask[:, None] & (c < C)[None, :]
        offsets = t64[:, None] * (N * C) + c[None, :]
        streams = load_streams(x_ptr, offsets, mask, C, N)
        du = tl.load(du_ptr + t64[:, None] * C + c[None, :], mask, 0.0).to(tl.float32)
        longer = ()
        for j in tl.static_range(N):
            longer = longer + (tl.fma(streams[j].to(tl.float32), du, d_pre[j]),)
            dx = h_pre[j][:, None] * du
            tl.store(dx_ptr + offsets + j * C, dx.to(dx_ptr.dtype.element_ty), mask)
        d_pre = longer
    for j in tl.static_range(N):
        tl.store(d_pre_ptr + t64 * N + j, tl.sum(d_pre[j], axis=1), t_mask)


@prepared
def _launch(
    device: torch.device, dtype: torch.dtype, n: int, width: int, backward: bool
) -> tuple[Launch, tiles.Tile, int]:
    """The kernel for streams of this dtype, its tile, and how many blocks of channels there are."""
    tile = tiles.aggregate(n, width, dtype)
    launch = Launch(
        aggregate_backward_kernel if backward else aggregate_kernel,
        device,
        N=n,
        C=width,
        BT=tile.tokens,
        BC=tile.channels,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return launch, tile, tiles.cdiv(width, tile.channels)


def make_u(sizes: Sizes, x: Tensor, h_pre: Tensor) -> Tensor:
    """Launch `aggregate_kernel`: streams x, h_pre [..., n] -> u [..., C]."""
    tokens, n, width = sizes
    u = x.new_empty(*h_pre.shape[:-1], width)
    if tokens > 0:
        launch, tile, blocks = _launch(x.device, x.dtype, n, width, False)
        launch((tiles.cdiv(tokens, tile.tokens) * blocks, 1), (x, h_pre, u), tokens)
    return u


def gradients_of_u(sizes: Sizes, x: Tensor, h_pre: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `aggregate_backward_kernel`: the gradients of streams x and of h_pre [..., n]."""
    tokens, n, width = sizes
    dx, d_pre = torch.empty_like(x), torch.empty_like(h_pre)
    if tokens > 0:
        launch, tile, _ = _launch(x.device, x.dtype, n, width, True)
        launch((tiles.cdiv(tokens, tile.tokens), 1), (x, h_pre, du, dx, d_pre), tokens)
    return dx, d_pre
