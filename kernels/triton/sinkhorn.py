"""`sinkhorn` in Triton, alone: the same device functions as inside the larger operations."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import sinkhorn_backward, sinkhorn_forward
from .launch import dense, launch
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


def _launch(logits: Tensor, gradient: Tensor | None, iterations: int, eps: float) -> Tensor:
    tokens, n, _ = logits.shape
    out = torch.empty_like(logits)
    if tokens > 0:
        launch(
            sinkhorn_kernel,
            (triton.cdiv(tokens, SINKHORN_TOKENS),),
            logits,
            dense(gradient),
            out,
            tokens,
            N=n,
            BACKWARD=gradient is not None,
            ITERATIONS=iterations,
            EPS=eps,
            BT=SINKHORN_TOKENS,
            num_warps=4,
        )
    return out


@operator("sinkhorn", "h_res")
def _sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """logits [T, n, n] fp32 -> [T, n, n] fp32."""
    return _launch(logits, None, iterations, eps)


@_sinkhorn.gradient
def _sinkhorn_backward(logits: Tensor, gradient: Tensor, iterations: int, eps: float) -> Tensor:
    """The gradient of the logits."""
    return _launch(logits, gradient, iterations, eps)


def sinkhorn(logits: Tensor, iterations: int = 20, eps: float = 0.0) -> Tensor:
    """See `reference.sinkhorn`."""
    n = logits.shape[-1]
    dense_logits = logits.to(torch.float32).reshape(-1, n, n).contiguous()
    return _sinkhorn(dense_logits, iterations, eps).view(logits.shape)
