"""The norm and the clipping of gradients of two dtypes.

Megatron hands all gradients to one kernel, which takes every one of them to be of the first one's
dtype. With `--grad-reduce-in-bf16` and a precision-aware optimizer gradients are in their
parameters' dtype: bf16, and fp32 those of mHC, whose halves would be read, and scaled, as bf16.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from .registry import Patch


def _one_dtype_at_a_time(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `multi_tensor_applier` for lists whose tensors are of several dtypes.

    Those of one dtype go to the original together. Of norms, (norm [1], one a tensor or None), the
    first becomes the norm of all; nobody here reads the second. A scaling returns nothing.
    """

    @functools.wraps(original)
    def applied(op: Any, overflow: Any, tensor_lists: list[Any], *args: Any) -> Any:
        first = tensor_lists[0]
        dtypes = dict.fromkeys(tensor.dtype for tensor in first)
        if len(dtypes) < 2:
            return original(op, overflow, tensor_lists, *args)
        results = []
        for dtype in dtypes:
            places = [i for i, tensor in enumerate(first) if tensor.dtype == dtype]
            lists = [[tensors[i] for i in places] for tensors in tensor_lists]
            results.append(original(op, overflow, lists, *args))
        norms = [result[0].reshape(1) for result in results if result is not None]
        return (torch.linalg.vector_norm(torch.cat(norms)).reshape(1), None) if norms else None

    return applied


def mixed_gradients_patch() -> Patch:
    """What the gradients' norm and their clipping apply their kernels with."""
    return Patch(
        id="mixed-gradients",
        target="megatron.core.optimizer.clip_grads:multi_tensor_applier",
        replace=_one_dtype_at_a_time,
        why="the gradients' norm and clipping take mHC's fp32 gradients and bf16 ones apart",
    )
