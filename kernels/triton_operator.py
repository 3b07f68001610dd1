"""An operation as PyTorch knows it: a custom operator, and a shorter way around it.

torch.compile and whatever else traces needs operators. A training step needs none, and they cost
its host 0.2 ms a site (both ways, measured on a CPU without launches): it calls the same functions
under an autograd.Function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Operator:
    """`megatron_mhc::NAME`, whose arguments begin with a tensor.

    Args:
        name: of the operator.
        function: what it does, with types that a custom operator's schema has.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = f"megatron_mhc::{name}"
        self._direct = function
        self._traced = torch.library.custom_op(self._name, function, mutates_args=())
        self.register_fake = self._traced.register_fake

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """As PyTorch's: `setup_context(ctx, inputs, output)`, `backward(ctx, *gradients)`.

        Either way the gradient has none of its own: asking for it raises a RuntimeError.
        """
        self._traced.register_autograd(backward, setup_context=setup_context)
        function = self._direct

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        # the profiler shows the name
        members = {
            "forward": staticmethod(forward),
            "backward": staticmethod(once_differentiable(backward)),
        }
        around: Any = type(self._name, (torch.autograd.Function,), members)
        self._direct = around.apply

    def __call__(self, *arguments: Any) -> Any:
        """Run it: the operator where something traces, else the function itself."""
        if torch.compiler.is_compiling() or type(arguments[0]) not in PLAIN or _watched():
            return self._traced(*arguments)
        return self._direct(*arguments)


PLAIN = (Tensor, torch.nn.Parameter)
"""Tensors that nobody traces with."""


def _watched() -> bool:
    """Whether a TorchDispatchMode is to see every operator."""
    return torch._C._len_torch_dispatch_stack() > 0


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """A decorator: the function as `Operator`."""
    return lambda function: Operator(name, function)
