"""An operation as PyTorch knows it: a custom operator, and two shorter ways around it.

torch.compile, and whatever else traces, needs operators. A training step does not, and they cost
its host time (docs/measured-facts.md): it calls the same functions under an autograd.Function.
The transforms of torch.func want that Function in another style, which costs more.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from ..arguments import Options

RESULTS = {
    "y": "nC",
    "u": "C",
    "h_pre": "n",
    "h_post": "n",
    "h_res": "nn",
    "normed": "R",
    "projected": "nR",
}
"""The last dimensions of what an operation returns under this name, behind those of the tokens: n
streams, C their width, R rows of the projection and one (`coefficients_kernel`). What has C is in
the dtype of x, all else in fp32. y has the shape of x."""
INNER = ("normed",)
"""Results that only the operation's own backward reads."""


def _dense(arguments: Iterable[Any]) -> list[Any]:
    """Contiguous tensors in the place of others."""
    return [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function, eval_str=True).parameters
    return {name: parameter.annotation for name, parameter in parameters.items()}


def _flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a custom operator's schema wants it: with the fields of its last argument in
    the place of `Options`, and an empty tensor in the place of no gradient."""
    signature = inspect.signature(function, eval_str=True)
    *parameters, last = signature.parameters.values()
    takes_options = last.annotation is Options
    if takes_options:
        fields = inspect.get_annotations(Options, eval_str=True).items()
        parameters += [inspect.Parameter(name, last.kind, annotation=kind) for name, kind in fields]
    else:
        parameters.append(last)

    def flat(*arguments: Any) -> Any:
        given = (*arguments[: -len(Options._fields)], _options(arguments))
        found = function(*_dense(given if takes_options else arguments))
        if isinstance(found, Tensor):
            return found
        return tuple(arguments[0].new_empty(0) if one is None else one for one in found)

    flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return flat


def _options(arguments: tuple[Any, ...]) -> Options:
    """The `Options` at the end of a custom operator's arguments."""
    return Options(*arguments[-len(Options._fields) :])


class Operator:
    """`megatron_mhc::NAME`, whose arguments begin with a tensor, x.

    A call returns all results but INNER ones; those that have no gradient are outside the graph.

    Args:
        name: of the operator.
        function: what it does: contiguous tensors, then the rest, with types that a custom
            operator's schema has; and, at the end, `Options`.
        results: the names in RESULTS of what it returns, or None for a gradient.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], results: tuple[str, ...] | None = None
    ) -> None:
        self._name = f"megatron_mhc::{name}"
        self._given = function
        self._flat = _flat(function)
        self._parameters = _annotations(self._flat)
        self._results = results or ()
        self._returned = len([name for name in self._results if name not in INNER])
        self._with_gradient = self._returned
        self._direct: Callable[..., Any] = self._gradient
        self._traced = torch.library.custom_op(self._name, self._flat, mutates_args=())
        self._transformed = self._for_transforms(_refuse, lambda *_: None)
        if results is not None:
            self._traced.register_fake(self._fake)

    def _fake(self, *arguments: Any) -> Any:
        """Results without values."""
        named = dict(zip(self._parameters, arguments, strict=True))
        x = arguments[0]
        shape = x.shape if "f" not in named else (*named["h_post"].shape, named["f"].shape[-1])
        *tokens, n, width = shape
        sizes = {"n": n, "C": width}
        for projection in {"phi", "fn", "theta"} & named.keys():
            sizes["R"] = named[projection].shape[0] + 1
        made = tuple(
            x.new_empty(
                x.shape if result == "y" else [*tokens, *(sizes[s] for s in RESULTS[result])],
                dtype=x.dtype if "C" in RESULTS[result] else torch.float32,
            )
            for result in self._results
        )
        return made if len(made) > 1 else made[0]

    def gradient(self, function: Callable[..., Any]) -> "Operator":
        """A decorator: the function becomes an operator of its own, the gradient of this one.

        It returns the gradients of this one's tensors, in their order; None for an absent one. Its
        arguments, in this order, say what is saved for it:
            all of this one's tensors, by their names;
            results of this one, by their names in RESULTS;
            gradients of this one's first results, by any other name: zeros where the type is
                Tensor and there is none, None where the type allows it;
            this one's other arguments, as far as it needs them, by their names.

        A gradient has no gradient: asking for one raises a RuntimeError.
        """
        backward = Operator(f"{self._name.partition('::')[2]}_backward", function)
        mine, its = _annotations(self._given), _annotations(function)
        tensors = [name for name in mine if mine[name] in _TENSORS]
        kept = [self._results.index(n) for n in its if n in self._results and n not in mine]
        constants = [name for name in its if name in mine and name not in tensors]
        gradients = [its[name] for name in its if name not in {*mine, *self._results}]
        absent = [i for i, name in enumerate(tensors) if mine[name] is not Tensor]
        count, due = len(tensors), len(gradients)
        single, materialize = count == 1, Tensor in gradients
        self._with_gradient = due

        def setup_for(names: list[str]) -> Callable[..., None]:
            places = [names.index(name) if name in names else None for name in constants]
            rest = (None,) * (len(names) - count)

            def setup(ctx: Any, inputs: Any, output: Any) -> None:
                results = (output,) if isinstance(output, Tensor) else output
                ctx.save_for_backward(*inputs[:count], *[results[index] for index in kept])
                ctx.constants = [_options(inputs) if i is None else inputs[i] for i in places]
                ctx.rest = rest
                if not materialize:
                    ctx.set_materialize_grads(False)

            return setup

        def derive(ctx: Any, *given: Any) -> Any:
            saved = ctx.saved_tensors
            found = backward(*saved, *_dense(given[:due]), *ctx.constants)
            if single:
                return (found, *ctx.rest)
            if absent:
                found = list(found)
                for index in absent:
                    if saved[index] is None:
                        found[index] = None
            return (*found, *ctx.rest)

        backward._traced.register_fake(lambda *arguments: _like(arguments[:count]))
        of_dense = setup_for(list(self._parameters))

        def setup(ctx: Any, inputs: Any, output: Any) -> None:
            # the operator made its own; a backward outside of what traced reads these as they are
            of_dense(ctx, _dense(inputs), output)

        self._traced.register_autograd(derive, setup_context=setup)
        self._transformed = self._for_transforms(derive, setup)
        self._direct = self._without_operator(derive, setup_for(list(mine)))
        return backward

    def _without_operator(
        self, backward: Callable[..., Any], setup_context: Callable[..., None]
    ) -> Callable[..., Any]:
        """The function itself under an autograd.Function, which saves what only the backward reads
        and hands on the rest."""
        function, returned, with_gradient = self._given, self._returned, self._with_gradient

        def forward(ctx: Any, *inputs: Any) -> Any:
            dense = _dense(inputs)
            output = function(*dense)
            setup_context(ctx, dense, output)
            if isinstance(output, Tensor):
                return output
            ctx.mark_non_differentiable(*output[with_gradient:returned])
            return output[:returned] if returned > 1 else output[0]

        return self._function(forward=forward, backward=backward)

    def _gradient(self, *arguments: Any) -> Any:
        """An operation that has no gradient, which is a gradient itself: refused where one is due.

        PyTorch enables gradients in a backward under `create_graph`.
        """
        if torch.is_grad_enabled():
            return self._transformed(*self._fields(arguments))
        return self._given(*arguments)

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

    def _fields(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the custom operator, which has the fields of `Options`."""
        *first, last = arguments
        return (*first, *last) if isinstance(last, Options) else arguments

    def __call__(self, *arguments: Any) -> Any:
        """Run it: the operator where something traces, else the function itself."""
        if torch.compiler.is_compiling() or not PLAIN.issuperset(map(type, arguments)):
            return self._returns(self._traced(*self._fields(arguments)))
        if _are_transforms_active():
            return self._returns(self._transformed(*self._fields(arguments)))
        if _count_modes() > 0:
            return self._returns(self._traced(*self._fields(arguments)))
        return self._direct(*arguments)

    def _returns(self, output: Any) -> Any:
        """What a call returns, of all that the custom operator does."""
        if self._returned == 0 or isinstance(output, Tensor):
            return output
        first, more = output[: self._with_gradient], output[self._with_gradient : self._returned]
        returned = (*first, *(result.detach() for result in more))
        return returned if len(returned) > 1 else returned[0]


def _like(tensors: tuple[Tensor | None, ...]) -> Any:
    """Gradients of these without values; the first is never absent."""
    made = tuple(
        tensors[0].new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)  # type: ignore[union-attr]
        for tensor in tensors
    )
    return made if len(made) > 1 else made[0]


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
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), int, float, bool, str, Options))
"""Types of arguments that nobody traces with, and whose memory a kernel may be given: what
collectives of torch.distributed return (`AsyncCollectiveTensor`) has an address of 0."""


_count_modes = torch._C._len_torch_dispatch_stack
"""How many TorchDispatchModes are to see every operator."""
_are_transforms_active = torch._C._are_functorch_transforms_active
"""Whether a transform of torch.func is on its way."""


def operator(name: str, *results: str) -> Callable[[Callable[..., Any]], Operator]:
    """A decorator: the function as `Operator`, whose results have these names."""
    return lambda function: Operator(name, function, results)
