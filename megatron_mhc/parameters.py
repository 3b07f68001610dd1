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
    """A module whose parameters stay fp32 where Megatron's Float16Module casts a model to bf16.

    Built on the meta device, they get their marks and their start back where they get memory.
    """

    def _start(self) -> dict[str, Tensor]:
        """Every parameter's value before training, by name."""
        raise NotImplementedError

    def _add_parameters(self, *, sequence_parallel: bool) -> None:
        for name, value in self._start().items():
            parameter = torch.nn.Parameter(value.to(torch.float32))
            setattr(parameter, MARK, True)
            # tensor-parallel ranks see different tokens then: Megatron sums the gradient over them
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give every parameter the value that it has before training."""
        for name, value in self._start().items():
            self.get_parameter(name).copy_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but never cast: `.bfloat16()` of a model around this one leaves it fp32."""
        before = dict(self.named_parameters(recurse=False))

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            same = moved.dtype == tensor.dtype or not moved.is_floating_point()
            return moved if same else tensor.to(moved.device)

        super()._apply(move, recurse)
        after = dict(self.named_parameters(recurse=False))
        for name, parameter in after.items():
            # from the meta device (`to_empty`) comes another object, with nothing in its memory
            if parameter is not before[name]:
                vars(parameter).update(vars(before[name]))
        if any(p.is_meta for p in before.values()) and not any(p.is_meta for p in after.values()):
            self.reset_parameters()
        return self
