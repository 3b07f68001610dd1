"""What every launcher needs: the device, dense arguments, the way to multiply by phi."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def phi_terms(dtype: torch.dtype) -> int:
    """How many bf16 terms stand for phi in products with streams in `dtype`.

    bf16 streams are exact in bf16, and two terms carry 16 bits of phi at the bf16 rate. Other
    streams meet phi in fp32 (one term, three TF32 products).
    """
    return 2 if dtype == torch.bfloat16 else 1


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Launch on the device of this tensor, whichever one is current."""
    if tensor.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise ValueError for float64, which only the reference computes."""
    if tensor.dtype == torch.float64:
        raise ValueError(
            f"{name} is torch.float64; the Triton kernels take bfloat16, float16 or float32: use"
            " backend='torch'"
        )


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself where it is contiguous, else a copy that is; None stays None."""
    return None if tensor is None else tensor.contiguous()
