"""`rebuild` in Triton: the streams of several sites again, from what each of them kept.

One kernel goes through the sites with the streams in registers: it reads f and writes y and u of
each, n + 2 passes a site. Stores may alias loads, so no compiler moves a site's loads before the
stores of the one before: the kernel can do so itself. It mixes and sums with the device functions
and in the order of the forward kernels, so what it writes equals, bit for bit, what they wrote.
Forward only.
"""

# ruff: noqa: RUF005 (Triton's language has no starred tuples)

from collections.abc import Sequence
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Mixing
from . import tiles
from .device import load_columns, load_streams, mixed_stream
from .launch import Launch, prepared
from .torch_operator import PLAIN


@triton.jit
def load_boundary(pointers, k: tl.constexpr, t64, t_mask, offsets, mask, N: tl.constexpr):
    """What boundary k has beside the streams: the tile of f, H_post, H_res, and H_pre behind it.

    pointers: of f, h_post, h_res and h_pre, each a tuple of all boundaries'.
    """
    f_ptrs, h_post_ptrs, h_res_ptrs, h_pre_ptrs = pointers
    f = tl.load(f_ptrs[k] + offsets, mask, 0.0)
    h_post = load_columns(h_post_ptrs[k], t64, t_mask, N)
    h_res = load_columns(h_res_ptrs[k], t64, t_mask, N * N)
    h_pre = load_columns(h_pre_ptrs[k], t64, t_mask, N)
    return f, h_post, h_res, h_pre


@triton.jit
def store_u(u_ptr, streams, h_pre, offsets, mask, N: tl.constexpr):
    """u = H_pre x of tiles in registers, summed as `aggregate_kernel` does."""
    u = tl.zeros_like(streams[0]).to(tl.float32)
    for i in tl.static_range(N):
        u = tl.fma(h_pre[i][:, None], streams[i].to(tl.float32), u)
    tl.store(u_ptr + offsets, u.to(u_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["T"])
def rebuild_kernel(
    x_ptr,
    first_u_ptr,
    first_h_pre_ptr,
    f_ptrs,
    f_bias_ptrs,
    h_post_ptrs,
    h_res_ptrs,
    h_pre_ptrs,
    y_ptrs,
    u_ptrs,
    T,
    N: tl.constexpr,
    C: tl.constexpr,
    FIRST: tl.constexpr,
    SITES: tl.constexpr,
    BIASES: tl.constexpr,
    AHEAD: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """u of the streams x (FIRST), then y and u of SITES boundaries, one tile a program.

    x, y [T, N, C]; f, u [T, C]; bit k of BIASES: whether boundary k has an f_bias [C]. AHEAD: what
    the next boundary has is loaded before this one's results are stored.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    t64 = t.to(tl.int64)
    t_mask = t < T
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = t_mask[:, None] & (c < C)[None, :]
    wide = t64[:, None] * (N * C) + c[None, :]
    narrow = t64[:, None] * C + c[None, :]
    streams = load_streams(x_ptr, wide, mask, C, N)
    if FIRST:
        first_h_pre = load_columns(first_h_pre_ptr, t64, t_mask, N)
    pointers = (f_ptrs, h_post_ptrs, h_res_ptrs, h_pre_ptrs)
    if AHEAD:
        ahead = load_boundary(pointers, 0, t64, t_mask, narrow, mask, N)
    if FIRST:
        store_u(first_u_ptr, streams, first_h_pre, narrow, mask, N)
    for k in tl.static_range(SITES):
        if AHEAD:
            f, h_post, h_res, h_pre = ahead
            if k + 1 < SITES:
                ahead = load_boundary(pointers, k + 1, t64, t_mask, narrow, mask, N)
        else:
            f, h_post, h_res, h_pre = load_boundary(pointers, k, t64, t_mask, narrow, mask, N)
        f = f.to(tl.float32)
        if (BIASES >> k) % 2 == 1:
            f += tl.load(f_bias_ptrs[k] + c, c < C, 0.0).to(tl.float32)[None, :]
        mixed = ()
        for i in tl.static_range(N):
            y = mixed_stream(streams, f, h_res, h_post, i, N).to(x_ptr.dtype.element_ty)
            tl.store(y_ptrs[k] + wide + i * C, y, mask)
            mixed = mixed + (y,)
        streams = mixed
        store_u(u_ptrs[k], streams, h_pre, narrow, mask, N)


@prepared
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    width: int,
    first: bool,
    f_biases: tuple[torch.dtype | None, ...],
    tile: tiles.Tile,
) -> Launch:
    """`rebuild_kernel` for as many boundaries as there are dtypes (or None) of an f_bias."""
    sites = len(f_biases)
    return Launch(
        rebuild_kernel,
        device,
        groups=(None, None, None, *(sites,) * 7),
        N=n,
        C=width,
        FIRST=first,
        SITES=sites,
        BIASES=sum(1 << k for k, bias in enumerate(f_biases) if bias is not None),
        AHEAD=tile.stages > 1 and sites > 0,
        BT=tile.tokens,
        BC=tile.channels,
        num_warps=tile.warps,
        maxnreg=tile.registers,
    )


def rebuild(
    x: Tensor,
    h_pre: Sequence[Tensor],
    ended: Sequence[Mixing],
    *,
    ys: Sequence[Tensor] | None = None,
    us: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """See `reference.rebuild`; ys and us are contiguous.

    Raises:
        TypeError: something is a tensor of another class, whose memory is not at hand.
    """
    *leading, n, width = x.shape
    given = [*(ys or ()), *(us or ())]
    read = (x, *h_pre, *chain(*ended), *given)
    if not PLAIN.issuperset(map(type, read)):
        others = sorted({kind.__name__ for kind in map(type, read) if kind not in PLAIN})
        raise TypeError(f"rebuild was given {', '.join(others)}; expected plain tensors")
    ys = [x.new_empty(x.shape) for _ in ended] if ys is None else list(ys)
    us = [x.new_empty(*leading, width) for _ in h_pre] if us is None else list(us)
    tokens = x.numel() // (n * width)
    if tokens == 0:
        return ys, us
    tile = tiles.rebuild(n, width, x.dtype)
    grid = (tiles.cdiv(tokens, tile.tokens), tiles.cdiv(width, tile.channels))
    h_pre, streams = [weights.contiguous() for weights in h_pre], x.contiguous()
    for start in range(0, max(len(ended), 1), tile.splits):
        part = slice(start, start + tile.splits)
        after = slice(start + 1, start + 1 + tile.splits)
        mixings = [[_dense(tensor) for tensor in site] for site in ended[part]]
        dtypes = tuple(None if bias is None else bias.dtype for *_, bias in mixings)
        sites = [(f, f if bias is None else bias, *h) for f, *h, bias in mixings]
        columns = chain(*zip(*sites, strict=True))
        tensors = (streams, us[0], h_pre[0], *columns, *h_pre[after], *ys[part], *us[after])
        launch = _launch(x.device, x.dtype, n, width, start == 0, dtypes, tile)
        launch(grid, tensors, tokens)
        if mixings:
            streams = ys[start + len(mixings) - 1]
    torch.autograd.graph.increment_version(given)
    return ys, us


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
