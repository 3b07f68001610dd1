"""An operation as PyTorch knows it: a custom operator, and two shorter ways around it.

torch.compile and whatever else traces needs operators. A training step needs none, and they cost
its host 0.2 ms a site (both ways, measured on a CPU without launches): it calls the same functions
under an autograd.Function. The transforms of torch.func want such a Function in another style,
which costs its host more.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers


class Operator:
    """`megatron_mhc::NAME`, whose arguments begin with a tensor.

    Args:
        name: of the operator.
        function: what it does, with types that a custom operator's schema has.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = f"megatron_mhc::{name}"
        self._given = function
        self._direct: Callable[..., Any] = self._gradient
        self._traced = torch.library.custom_op(self._name, function, mutates_args=())
        self._transformed = self._for_transforms(_refuse, lambda *_: None)
        self.register_fake = self._traced.register_fake

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """As PyTorch's: `setup_context(ctx, inputs, output)`, `backward(ctx, *gradients)`.

        Either way the gradient has none of its own: asking for it raises a RuntimeError.
        """
        self._traced.register_autograd(backward, setup_context=setup_context)
        self._transformed = self._for_transforms(backward, setup_context)
        function = self._given

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        self._direct = self._function(forward=forward, backward=backward)

    def _gradient(self, *arguments: Any) -> Any:
        """An operation that has no gradient, which is a gradient itself: refused where one is due.

        PyTorch enables gradients in a backward under `create_graph`.
        """
        run = self._transformed if torch.is_grad_enabled() else self._given
        return run(*arguments)

    def _for_transforms(
        self, backward: Callable[..., Any], setup_context: Callable[..., None]
    ) -> Callable[..., Any]:
        """The operator under an autograd.Function that torch.func transforms, level by level."""

        def any_level(ctx: Any, *gradients: Any) -> Any:
            return backward(_Alive(ctx), *gradients)

        return self._function(
            forward=self._traced, setup_context=setup_context, backward=any_level, vmap=_no_vmap
        )

    def _function(self, **members: Callable[..., Any]) -> Callable[..., Any]:
        """`apply` of an autograd.Function with these members; the profiler shows its name."""
        static = {name: staticmethod(member) for name, member in members.items()}
        function: Any = type(self._name, (torch.autograd.Function,), static)
        return function.apply

    def __call__(self, *arguments: Any) -> Any:
        """Run it: the operator where something traces, else the function itself."""
        if torch.compiler.is_compiling() or type(arguments[0]) not in PLAIN:
            return self._traced(*arguments)
        if _transformed():
            return self._transformed(*arguments)
        if _watched():
            return self._traced(*arguments)
        return self._direct(*arguments)


class _Alive:
    """A ctx whose tensors have left the transforms that are over, as those of torch.func.vjp are
    when the function that it returned is called."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        return unwrap_dead_wrappers(self._ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _refuse(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError(
        "the gradient of mHC's Triton kernels has no gradient of its own; the reference's has"
        " (backend='torch')"
    )


def _no_vmap(*_: Any) -> Any:
    raise RuntimeError(
        "mHC's Triton kernels have no rule for torch.func.vmap; they take any leading dimensions"
        " as they are, and the reference can be vmapped (backend='torch')"
    )


PLAIN = (Tensor, torch.nn.Parameter)
"""Tensors that nobody traces with."""


def _watched() -> bool:
    """Whether a TorchDispatchMode is to see every operator."""
    return torch._C._len_torch_dispatch_stack() > 0


def _transformed() -> bool:
    """Whether a transform of torch.func is on its way."""
    return torch._C._are_functorch_transforms_active()


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """A decorator: the function as `Operator`."""
    return lambda function: Operator(name, function)
