"""What every launcher needs: the device, dense arguments, packed weights."""

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_config import padded

PHI_TERMS = 3
"""bf16 terms that phi is split into for bf16 streams: 8 bits of its mantissa each, all of it."""


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Launch on the device of this tensor, whichever one is current."""
    if tensor.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself where it is contiguous, else a copy that is; None stays None."""
    return None if tensor is None else tensor.contiguous()


@triton.jit
def pack_kernel(
    phi_ptr,
    packed_ptr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    BC: tl.constexpr,
):
    """packed[term, row, c] with sum over terms = phi[row, c]; rows past ROWS are zero."""
    c = (tl.program_id(0) * BC + tl.arange(0, BC))[None, :]
    row = (tl.program_id(1) + tl.arange(0, 1))[:, None]
    rest = tl.load(phi_ptr + row * WIDTH + c, (c < WIDTH) & (row < ROWS), 0.0)  # [1, BC]
    for term in tl.static_range(TERMS):
        part = rest.to(packed_ptr.dtype.element_ty)
        tl.store(packed_ptr + (term * R + row) * WIDTH + c, part, (c < WIDTH) & (row < R))
        rest -= part.to(tl.float32)


def pack_weights(phi: Tensor, dtype: torch.dtype) -> Tensor:
    """phi [rows, n*C] fp32 -> [terms, padded rows, n*C], for products with streams in `dtype`.

    bf16 streams are exact in bf16, so phi as a sum of bf16 terms gives a nearly exact product at
    the bf16 rate. Other streams meet phi in fp32 (three TF32 products).
    """
    rows, width = phi.shape
    terms = PHI_TERMS if dtype == torch.bfloat16 else 1
    packed = torch.empty(
        terms,
        padded(rows),
        width,
        device=phi.device,
        dtype=torch.bfloat16 if terms > 1 else torch.float32,
    )
    tile = 1024
    with on_device(phi):
        pack_kernel[(triton.cdiv(width, tile), padded(rows))](
            phi, packed, width, rows, padded(rows), terms, tile, num_warps=4
        )
    return packed
