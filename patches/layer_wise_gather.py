"""The gather of Megatron's layer-wise optimizer (Muon's), where parameters are of two dtypes.

Each rank steps whole parameters of its own and sends them to the others as one tensor, which the
others receive in the dtype of the first parameter. With mHC's fp32 parameters between bf16 ones, a
rank that has none of them sends another dtype than is received, and every rank stops.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from .registry import Patch

_LISTS = ("dp_cp_params_list", "expt_dp_params_list")
"""Attributes of the optimizer: every rank's parameters, a list for each; None where one has all."""


def _of_dtype(ranks: list[list[torch.Tensor]], dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Those of one dtype. Megatron looks at the first rank's first, so that there is one: empty."""
    found = [[parameter for parameter in own if parameter.dtype == dtype] for own in ranks]
    device = next(parameter.device for own in ranks for parameter in own)
    return [[torch.empty(0, dtype=dtype, device=device), *found[0]], *found[1:]]


def _one_dtype_at_a_time(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def allgather_params(self: Any) -> None:
        lists = {name: ranks for name in _LISTS if (ranks := getattr(self, name))}
        dtypes = {p.dtype for ranks in lists.values() for own in ranks for p in own}
        if len(dtypes) < 2:
            original(self)
            return
        try:
            for dtype in sorted(dtypes, key=str):  # every rank in this order
                for name, ranks in lists.items():
                    setattr(self, name, _of_dtype(ranks, dtype))
                original(self)
        finally:
            for name, ranks in lists.items():
                setattr(self, name, ranks)

    return allgather_params


def layer_wise_gather_patch() -> Patch:
    """Where this Megatron has that optimizer."""
    return Patch(
        id="muon-gather",
        target="megatron.core.optimizer.layer_wise_optimizer:"
        "LayerWiseDistributedOptimizer.allgather_params",
        replace=_one_dtype_at_a_time,
        why="gathers mHC's fp32 parameters and bf16 ones apart",
        optional=True,
    )
