"""What all parameters of mHC have in common: fp32 always, marked, on no weight-decay list."""

import abc
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

MARK = "is_hyper_connection"
"""The attribute that marks a parameter of mHC (`patches.parameter_groups` goes by it)."""


def is_hyper_connection(parameter: Tensor) -> bool:
    """Whether this parameter belongs to mHC."""
    return bool(getattr(parameter, MARK, False))


class Fp32Module(torch.nn.Module, abc.ABC):
    """A module whose parameters stay fp32 where Megatron's Float16Module casts a model to bf16.

    They keep their marks where PyTorch puts others in their place: when a model leaves the meta
    device, and when a state dict is assigned.
    """

    def _add_parameters(self, *, sequence_parallel: bool) -> None:
        for name, value in self._start().items():
            parameter = torch.nn.Parameter(value.to(torch.float32))
            setattr(parameter, MARK, True)
            # tensor-parallel ranks see different tokens then: Megatron sums the gradient over them
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
            parameter._tensor_parallel_mode = "replicated"  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)

    @abc.abstractmethod
    def _start(self) -> dict[str, Tensor]:
        """Every parameter's value at the start of training, by name."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its value at the start."""
        for name, value in self._start().items():
            self.get_parameter(name).copy_(value)

    @contextlib.contextmanager
    def _keeping_marks(self) -> Iterator[None]:
        kept = {name: dict(vars(parameter)) for name, parameter in self._parameters.items()}
        yield
        for name, marks in kept.items():
            vars(self._parameters[name]).update(marks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but never cast: `.bfloat16()` of a model around this one leaves it fp32."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            same = moved.dtype == tensor.dtype or not moved.is_floating_point()
            return moved if same else tensor.to(moved.device)

        def is_meta() -> bool:
            return any(parameter.is_meta for parameter in self.parameters(recurse=False))

        was_meta = is_meta()
        with self._keeping_marks():
            super()._apply(move, recurse)
        if was_meta and not is_meta():
            # memory without values; unlike a matrix of Megatron's, ours have one start, not a draw
            self.reset_parameters()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        with self._keeping_marks():
            super()._load_from_state_dict(*args)
