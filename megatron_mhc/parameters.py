"""What all parameters of mHC have in common: fp32 always, marked, on no weight-decay list."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MARK = "is_hyper_connection"
"""The attribute that marks a parameter of mHC (`patches.parameter_groups` goes by it)."""


def is_hyper_connection(parameter: Tensor) -> bool:
    """Whether this parameter belongs to mHC."""
    return bool(getattr(parameter, MARK, False))


class Fp32Module(torch.nn.Module):
    """A module whose parameters stay fp32 where Megatron's Float16Module casts a model to bf16."""

    def _add_parameter(self, name: str, value: Tensor, *, sequence_parallel: bool) -> None:
        parameter = torch.nn.Parameter(value.to(torch.float32))
        setattr(parameter, MARK, True)
        # tensor-parallel ranks see different tokens then: Megatron sums the gradient over them
        parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but never cast: `.bfloat16()` of a model around this one leaves it fp32."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            same = moved.dtype == tensor.dtype or not moved.is_floating_point()
            return moved if same else tensor.to(moved.device)

        return super()._apply(move, recurse)
