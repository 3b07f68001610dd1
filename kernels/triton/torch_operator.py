"""An operation as PyTorch knows it: a custom operator, and two shorter ways around it.

torch.compile, and whatever else traces, needs operators. A training step does not, and they cost
its host time (docs/measured-facts.md): it calls the same functions under an autograd.Function.
The transforms of torch.func want that Function in another style, which costs more.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from ..arguments import Options

RESULTS = {
    "y": "TnC",
    "u": "TC",
    "h_pre": "Tn",
    "h_post": "Tn",
    "h_res": "Tnn",
    "z_over_r": "TR",
    "inverse_r": "T",
}
"""The shape of what an operation returns under this name: T tokens, n streams, C their width, R
rows of the projection. What has C is in the dtype of x; all else is fp32."""


def _flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the fields of its last argument, `options`, in place of that one: a custom
    operator's schema knows no tuples with names."""
    signature = inspect.signature(function, eval_str=True)
    *parameters, last = signature.parameters.values()
    if last.annotation is not Options:
        return function
    first = len(parameters)

    def flat(*arguments: Any) -> Any:
        return function(*arguments[:first], Options(*arguments[first:]))

    fields = inspect.get_annotations(Options, eval_str=True).items()
    parameters += [inspect.Parameter(name, last.kind, annotation=kind) for name, kind in fields]
    flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return flat


class Operator:
    """`megatron_mhc::NAME`, whose arguments begin with a tensor, x.

    Args:
        name: of the operator.
        function: what it does: tensors, then the rest, with types that a custom operator's schema
            has; and, at the end, `Options`.
        results: the names in RESULTS of what it returns, or None for a gradient.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], results: tuple[str, ...] | None = None
    ) -> None:
        self._name = f"megatron_mhc::{name}"
        self._given = _flat(function)
        parameters = inspect.signature(self._given, eval_str=True).parameters
        self._parameters = {name: p.annotation for name, p in parameters.items()}
        self._results = results or ()
        self._direct: Callable[..., Any] = self._gradient
        self._traced = torch.library.custom_op(self._name, self._given, mutates_args=())
        self._transformed = self._for_transforms(_refuse, lambda *_: None)
        if results is not None:
            self._traced.register_fake(self._fake)

    def _fake(self, *arguments: Any) -> Any:
        """Results without values."""
        named = dict(zip(self._parameters, arguments, strict=True))
        x, sizes = arguments[0], dict(zip("TnC", arguments[0].shape, strict=True))
        for projection in {"phi", "fn"} & named.keys():
            sizes["R"] = named[projection].shape[0]
        made = tuple(
            x.new_empty(
                [sizes[size] for size in RESULTS[result]],
                dtype=x.dtype if "C" in RESULTS[result] else torch.float32,
            )
            for result in self._results
        )
        return made if len(made) > 1 else made[0]

    def gradient(self, function: Callable[..., Any]) -> "Operator":
        """A decorator: the function becomes an operator of its own, the gradient of this one.

        It returns the gradients of this one's tensors, in their order; that of an absent one is
        empty. Its arguments, in this order, say what is saved for it:
            all of this one's tensors, by their names;
            results of this one, by their names in RESULTS;
            gradients of this one's first results, by any other name: zeros where the type is
                Tensor and there is none, None where the type allows it;
            this one's other arguments, as far as it needs them, by their names.

        A gradient has no gradient: asking for one raises a RuntimeError.
        """
        backward = Operator(f"{self._name.partition('::')[2]}_backward", function)
        mine, its = list(self._parameters), backward._parameters
        tensors = [name for name in mine if self._parameters[name] in _TENSORS]
        constants = [mine.index(name) for name in its if name in mine and name not in tensors]
        kept = [self._results.index(n) for n in its if n in self._results and n not in mine]
        known = {*mine, *self._results}
        gradients = [kind for name, kind in its.items() if name not in known]
        count, due, rest = len(tensors), len(gradients), (None,) * (len(mine) - len(tensors))
        absent = [i for i, name in enumerate(tensors) if self._parameters[name] is not Tensor]
        single, materialize = count == 1, Tensor in gradients

        def fake(*arguments: Any) -> Any:
            x = arguments[0]
            made = tuple(
                x.new_empty(0) if tensor is None else torch.empty_like(tensor)
                for tensor in arguments[:count]
            )
            return made[0] if single else made

        def setup(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs[:count], *[output[index] for index in kept])
            ctx.constants = [inputs[index] for index in constants]
            if not materialize:
                ctx.set_materialize_grads(False)

        def derive(ctx: Any, *given: Any) -> Any:
            saved = ctx.saved_tensors
            found = backward(*saved, *given[:due], *ctx.constants)
            if single:
                return (found, *rest)
            if absent:
                found = list(found)
                for index in absent:
                    if saved[index] is None:
                        found[index] = None
            return (*found, *rest)

        backward._traced.register_fake(fake)
        self._register_autograd(derive, setup)
        return backward

    def _register_autograd(
        self, backward: Callable[..., Any], setup_context: Callable[..., None]
    ) -> None:
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


_TENSORS = (Tensor, Tensor | None)
PLAIN = (Tensor, torch.nn.Parameter)
"""Tensors that nobody traces with."""


def _watched() -> bool:
    """Whether a TorchDispatchMode is to see every operator."""
    return torch._C._len_torch_dispatch_stack() > 0


def _transformed() -> bool:
    """Whether a transform of torch.func is on its way."""
    return torch._C._are_functorch_transforms_active()


def operator(name: str, *results: str) -> Callable[[Callable[..., Any]], Operator]:
    """A decorator: the function as `Operator`, whose results have these names."""
    return lambda function: Operator(name, function, results)
