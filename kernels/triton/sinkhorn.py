"""`sinkhorn` in Triton, alone: the same device functions as inside the larger operations."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .device import sinkhorn_backward, sinkhorn_forward
from .launch import Launch, prepared
from .tiles import SINKHORN_TOKENS
from .torch_operator import operator


@triton.jit(do_not_specialize=["T"])
def sinkhorn_kernel(
    logits_ptr,
    gradient_ptr,
    out_ptr,
    T,
    N: tl.constexpr,
    BACKWARD: tl.constexpr,
    ITERATIONS: tl.constexpr,
    EPS: tl.constexpr,
    BT: tl.constexpr,
):
    """out [T, N, N] = the matrices, or (BACKWARD) the gradient of the logits."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    j = tl.arange(0, N)
    entry = j[:, None] * N + j[None, :]  # [N, N] (dst, src)
    offsets = t.to(tl.int64)[:, None, None] * (N * N) + entry[None, :, :]
    mask = (t < T)[:, None, None] & (entry >= 0)[None, :, :]
    logits = tl.load(logits_ptr + offsets, mask, 0.0)
    if BACKWARD:
        gradient = tl.load(gradient_ptr + offsets, mask, 0.0)
        out = sinkhorn_backward(logits, gradient, ITERATIONS, EPS)
    else:
        out = sinkhorn_forward(logits, ITERATIONS, EPS)
    tl.store(out_ptr + offsets, out, mask)


@prepared
def _launch(device: torch.device, n: int, backward: bool, iterations: int, eps: float) -> Launch:
    return Launch(
        sinkhorn_kernel,
        device,
        N=n,
        BACKWARD=backward,
        ITERATIONS=iterations,
        EPS=eps,
        BT=SINKHORN_TOKENS,
        num_warps=4,
    )


def _run(logits: Tensor, gradient: Tensor | None, iterations: int, eps: float) -> Tensor:
    n = logits.shape[-1]
    tokens = logits.numel() // (n * n)
    out = torch.empty_like(logits)
    if tokens > 0:
        launch = _launch(logits.device, n, gradient is not None, iterations, eps)
        launch((tiles.cdiv(tokens, SINKHORN_TOKENS), 1), (logits, gradient, out), tokens)
    return out


@operator("sinkhorn", "h_res")
def _sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """logits [..., n, n] fp32 -> [..., n, n] fp32."""
    return _run(logits, None, iterations, eps)


@_sinkhorn.gradient
def _sinkhorn_backward(logits: Tensor, gradient: Tensor, iterations: int, eps: float) -> Tensor:
    """The gradient of the logits."""
    return _run(logits, gradient, iterations, eps)


def sinkhorn(logits: Tensor, iterations: int = 20, eps: float = 0.0) -> Tensor:
    """See `reference.sinkhorn`."""
    return _sinkhorn(logits.to(torch.float32), iterations, eps)
