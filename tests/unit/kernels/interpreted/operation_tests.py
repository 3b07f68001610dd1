"""What holds for every operation, as tests: a file an operation takes them over and adds its own.

All compare with the reference in float64.
"""

import contextlib
import inspect
import re
from typing import Any

import pytest
import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megatron_mhc import kernels
from megatron_mhc.kernels import reference
from megatron_mhc.kernels.arguments import DEFAULT
from megatron_mhc.kernels.triton import operations
from megatron_mhc.kernels.triton.launch import Launch
from tests.kernel_cases import (
    DEEPSEEK,
    LARGE_EPS,
    OTHER_FORMS,
    PAPER,
    check,
    inputs,
    run,
    settings,
)

CASES = (
    # tokens, n, width, convention, iterations: an odd width, several tiles, every n
    (5, 4, 131, PAPER, 20),
    (1, 1, 33, DEEPSEEK, 2),
    (9, 2, 40, DEEPSEEK, 3),
    (3, 8, 40, PAPER, 1),
    (4, 4, 48, LARGE_EPS, 4),
    (3, 4, 40, OTHER_FORMS, 3),
)


def dtype_and_case(dtype: torch.dtype, case: tuple) -> Any:
    """Every case in bf16, the first one in the others (`test_tiles` has eight streams in fp32); the
    rest too, where thorough: a dtype and a shape have nothing to do with each other."""
    often = dtype == torch.bfloat16 or case is CASES[0]
    marks = () if often else (pytest.mark.thorough,)
    return pytest.param(dtype, case, marks=marks, id=f"{dtype}-T{case[0]}-n{case[1]}-C{case[2]}")


DTYPES_AND_CASES = [
    dtype_and_case(dtype, case)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for case in CASES
]


def results_and_gradients(
    operation: str, arguments: dict[str, torch.Tensor], backend: str
) -> dict[str, torch.Tensor]:
    """What an operation returns for these values, and all gradients for a gradient of ones."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in arguments.items()}
    out = run(getattr(kernels, operation), leaves, backend=backend)
    torch.autograd.backward(out, [torch.ones_like(result) for result in out])
    results = {f"result {index}": result.detach() for index, result in enumerate(out)}
    return results | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}


class Watch(TorchDispatchMode):
    """Sees every operator, as whatever traces does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple]] = {}
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Keep our operators with copies of their arguments."""
        self.namespaces.add(function.namespace)
        if function.namespace == "megatron_mhc":
            copies = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args)
            self.calls[function.name()] = (function, copies)
        return function(*args, **(kwargs or {}))


class _Handed(torch.autograd.Function):
    """A tensor as `wrap` hands it on; its gradient comes back plain."""

    @staticmethod
    def forward(ctx, tensor, wrap):  # type: ignore[no-untyped-def]
        """wrap(tensor)."""
        return wrap(tensor.detach())

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        """The gradient as it came."""
        return getattr(gradient, "elem", gradient), None


class Operation:
    """Of an operation of `kernels`, named by `operation`."""

    operation: str

    @pytest.mark.parametrize(("dtype", "case"), DTYPES_AND_CASES)
    def test_results_and_gradients(self, dtype: torch.dtype, case: tuple) -> None:
        tokens, n, width, convention, iterations = case
        check(self.operation, tokens, n, width, dtype, "cpu", convention, iterations)

    def test_no_tokens(self) -> None:
        arguments = inputs(self.operation, 0, 4, 24, torch.bfloat16, "cpu")
        out = run(getattr(kernels, self.operation), arguments, backend="triton")
        torch.autograd.backward(out, [torch.ones_like(result) for result in out])
        for name, argument in arguments.items():
            assert argument.grad.shape == argument.shape, name
            assert bool((argument.grad == 0).all()), name

    @pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=["inf", "nan"])
    def test_what_is_not_finite_shows_and_stays_in_its_token(self, bad: float) -> None:
        """A token's results and gradients are finite where the reference's are, and nowhere else.

        The reference runs in float64, where nothing overflows in between.
        """
        arguments = inputs(self.operation, 5, 4, 40, torch.float32, "cpu")
        a_token = [name for name, tensor in arguments.items() if tensor.shape[0] == 5]
        for name in {"x", "f", "h_post", "logits"} & set(a_token):
            spoilt = {k: v.detach().clone() for k, v in arguments.items()}
            spoilt[name][1].view(-1)[2] = bad
            got = results_and_gradients(self.operation, spoilt, "triton")
            exact = {k: v.double() for k, v in spoilt.items()}
            want = results_and_gradients(self.operation, exact, "torch")
            assert not all(bool(want[key].isfinite().all()) for key in want), name
            for key, tensor in got.items():
                if key.startswith("result") or key.removeprefix("d_") in a_token:
                    assert bool(tensor[[0, 2, 3, 4]].isfinite().all()), (name, key)
                finite = bool(want[key].isfinite().all())
                assert bool(tensor.isfinite().all()) == finite, (name, key)

    def test_zero_streams(self) -> None:
        """The norm of nothing: everything is finite, and the reference's in float64."""
        arguments = inputs(self.operation, 3, 4, 40, torch.float32, "cpu")
        zero = {
            name: torch.zeros_like(t) if name in ("x", "f", "logits") else t.detach()
            for name, t in arguments.items()
        }
        got = results_and_gradients(self.operation, zero, "triton")
        exact = {k: v.double() for k, v in zero.items()}
        for key, want in results_and_gradients(self.operation, exact, "torch").items():
            # the same sums in fp32; gradients of x are a thousand times those of ordinary streams
            torch.testing.assert_close(got[key].double(), want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("f_bias", [True, False], ids=["f_bias", "no f_bias"])
    def test_operators_are_what_they_say(self, f_bias: bool) -> None:
        """Schemas, fake tensors and autograd of every registered operator, as PyTorch checks them.

        Each is caught in a call of the operation that it serves, forward and backward.
        """
        arguments = inputs(self.operation, 3, 4, 24, torch.bfloat16, "cpu")
        if not f_bias and arguments.pop("f_bias", None) is None:
            return  # the operation has none: the other case is all of it
        with Watch() as watch:
            out = run(getattr(kernels, self.operation), arguments, backend="triton")
            torch.autograd.backward(out, [torch.ones_like(result) for result in out])
        assert {name.endswith("_backward") for name in watch.calls} == {True, False}
        torch.use_deterministic_algorithms(False)  # the checks compare two calls' empty results
        for function, args in watch.calls.values():
            backward = function.name().endswith("_backward")
            args = tree_map_only(torch.Tensor, lambda t: t.requires_grad_(not backward), args)  # noqa: B023
            torch.library.opcheck(
                function,
                args,
                test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
            )

    def test_directly_and_as_operators_alike(self) -> None:
        """What torch.compile traces and what a training step calls: the same bits."""
        found = []
        for watched in (False, True):
            watch = Watch()
            arguments = inputs(self.operation, 5, 4, 40, torch.bfloat16, "cpu")
            with watch if watched else contextlib.nullcontext():
                out = run(getattr(kernels, self.operation), arguments, backend="triton")
                torch.autograd.backward(out, [torch.ones_like(result) for result in out])
            assert ("megatron_mhc" in watch.namespaces) == watched
            found.append([*out, *(argument.grad for argument in arguments.values())])
        for direct, traced in zip(*found, strict=True):
            assert torch.equal(direct, traced)

    def test_tensors_whose_memory_is_not_at_hand(self) -> None:
        """What collectives of torch.distributed return has an address of 0, as any argument but the
        first and as gradients: the same bits as of plain tensors."""
        found = []
        for wrap in (torch.Tensor.detach, AsyncCollectiveTensor):
            arguments = inputs(self.operation, 5, 4, 40, torch.float32, "cpu")
            first, *others = arguments
            given = {name: _Handed.apply(arguments[name], wrap) for name in others}
            called = {first: arguments[first], **given}
            out = run(getattr(kernels, self.operation), called, backend="triton")
            torch.autograd.backward(out, [wrap(torch.ones_like(result)) for result in out])
            found.append([*out, *(argument.grad for argument in arguments.values())])
        for plain, handed in zip(*found, strict=True):
            assert torch.equal(plain, handed)

    def test_whole_numbers_are_taken_as_floats(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A GPU's launch refuses an int where a kernel has a float: eps=0 stopped there."""
        handed: set[tuple[str, str, type]] = set()

        def note_eps(self: Launch, grid: Any, tensors: Any, *numbers: Any) -> None:
            names = self.kernel.arg_names[len(tensors) :]
            for name, value in [*zip(names, numbers, strict=False), *self.constants.items()]:
                if re.fullmatch("(.*_)?eps", name.lower()):
                    handed.add((self.kernel.__name__, name, type(value)))
            call(self, grid, tensors, *numbers)

        call = Launch.__call__
        monkeypatch.setattr(Launch, "__call__", note_eps)
        eps = {n: 1 for n in settings(self.operation, PAPER, 20) if n.endswith("eps")}
        for function in (self.operation, f"{self.operation}_with_h_pre"):
            if hasattr(kernels, function):
                arguments = inputs(self.operation, 3, 4, 24, torch.float32, "cpu")
                out = run(getattr(kernels, function), arguments, backend="triton", **eps)
                wanted = [result for result in out if result.requires_grad]
                torch.autograd.backward(wanted, [torch.ones_like(result) for result in wanted])
        assert bool(handed) == bool(eps)
        assert {kind for _, _, kind in handed} <= {float}, handed

    @pytest.mark.parametrize("named", [True, False], ids=["all arguments", "all but the first"])
    def test_torch_func_differentiates(self, named: bool) -> None:
        """grad and vjp, whose function is called when the transform is over: autograd's bits."""
        given = {
            k: v.detach() for k, v in inputs(self.operation, 3, 4, 24, torch.float32, "cpu").items()
        }
        fixed = {} if named else dict([next(iter(given.items()))])
        free = {name: tensor for name, tensor in given.items() if name not in fixed}
        if not free:
            return  # the operation has one argument

        def loss(free: dict[str, torch.Tensor]) -> torch.Tensor:
            out = run(getattr(kernels, self.operation), {**fixed, **free}, backend="triton")
            return sum(result.square().sum() for result in out)

        leaves = {name: tensor.clone().requires_grad_() for name, tensor in free.items()}
        loss(leaves).backward()
        _, derive = torch.func.vjp(loss, free)
        for gradients in (torch.func.grad(loss)(free), *derive(torch.ones(()))):
            for name, leaf in leaves.items():
                assert torch.equal(gradients[name], leaf.grad), name

    def test_torch_func_has_no_second_gradient_and_no_vmap(self) -> None:
        """Refused in whatever way it is asked for: what autograd cannot see would be zero."""
        given = {
            k: v.detach() for k, v in inputs(self.operation, 3, 4, 24, torch.float32, "cpu").items()
        }
        name, tensor = next(iter(given.items()))

        def loss(tensor: torch.Tensor) -> torch.Tensor:
            out = run(getattr(kernels, self.operation), given | {name: tensor}, backend="triton")
            return sum(result.square().sum() for result in out)

        def of_gradient(tensor: torch.Tensor) -> torch.Tensor:
            return torch.func.grad(loss)(tensor).square().sum()

        with pytest.raises(RuntimeError, match="no gradient of its own; the reference's has"):
            torch.func.grad(of_gradient)(tensor)
        with pytest.raises(RuntimeError, match="no gradient of its own; the reference's has"):
            of_gradient(tensor.clone().requires_grad_()).backward()
        _, derive = torch.func.vjp(loss, tensor.clone().requires_grad_())
        with pytest.raises(RuntimeError, match="no gradient of its own; the reference's has"):
            derive(torch.ones(()))[0].square().sum().backward()
        with pytest.raises(RuntimeError, match="take any leading dimensions as they are"):
            torch.func.vmap(loss)(torch.stack([tensor, tensor]))

    @pytest.mark.parametrize("traced", [False, True], ids=["direct", "traced"])
    @pytest.mark.parametrize("constant", [True, False], ids=["constant", "not constant"])
    def test_a_gradients_gradient_is_refused(self, constant: bool, traced: bool) -> None:
        """And never left out without a word, also where the gradient that came in is a constant."""
        arguments = inputs(self.operation, 3, 4, 24, torch.float32, "cpu")
        first = next(iter(arguments.values()))
        with Watch() if traced else contextlib.nullcontext():
            out = run(getattr(kernels, self.operation), arguments, backend="triton")
            loss = sum((result if constant else result.square()).sum() for result in out)
            (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
            with pytest.raises(RuntimeError, match=r"gradient of its own|no autograd formula"):
                (gradient + first).square().sum().backward()

    def test_inference_mode(self) -> None:
        """Tensors from outside it, and tensors made in it, which count no versions."""
        outside = inputs(self.operation, 5, 4, 24, torch.bfloat16, "cpu")
        wanted = run(getattr(kernels, self.operation), outside, backend="triton")
        with torch.inference_mode():
            inside = {name: tensor.detach().clone() for name, tensor in outside.items()}
            assert all(tensor.is_inference() for tensor in inside.values())
            for arguments in (outside, inside):
                got = run(getattr(kernels, self.operation), arguments, backend="triton")
                assert all(map(torch.equal, got, wanted))

    def test_keywords_are_the_references(self) -> None:
        """Those of `coefficients` are one argument in Triton, with the same defaults."""

        def parameters(function: Any) -> list[tuple[str, Any, Any]]:
            known = inspect.signature(function).parameters.values()
            return [(p.name, p.default, p.kind) for p in known if p.name != "backend"]

        public = parameters(getattr(kernels, self.operation))
        triton = parameters(getattr(operations, self.operation))
        of_reference = parameters(getattr(reference, self.operation))
        keyword = inspect.Parameter.KEYWORD_ONLY
        options = [(name, default, keyword) for name, default in DEFAULT._asdict().items()]
        assert set(options) <= set(parameters(reference.coefficients))
        takes_options = triton[-1] == ("options", DEFAULT, keyword)
        assert public == (triton[:-1] + options if takes_options else triton)
        if of_reference[-1][0] == "options":  # handed on to `coefficients` as they are
            assert takes_options
            of_reference[-1:] = options
        assert public == of_reference
        assert set(settings(self.operation, PAPER, 20)) <= {name for name, _, _ in public}


class Projecting(Operation):
    """Of an operation that projects streams to logits."""

    def test_large_logits_saturate(self) -> None:
        """Sigmoids of +-80 and a Sinkhorn of +-80: finite, and the reference's in float64."""
        arguments = {
            k: v.detach().clone()
            for k, v in inputs(self.operation, 3, 4, 40, torch.float32, "cpu").items()
        }
        bias = arguments["base" if self.operation == "head" else "bias"]
        signs = torch.randn(bias.shape, generator=torch.Generator().manual_seed(5)).sign()
        bias.add_(80 * signs)
        got = results_and_gradients(self.operation, arguments, "triton")
        exact = {k: v.double() for k, v in arguments.items()}
        for key, want in results_and_gradients(self.operation, exact, "torch").items():
            # a logit of 80 rounds by 2^-18, which a sigmoid or a matrix entry scales by <= 1/4;
            # sums of some hundred such terms
            torch.testing.assert_close(got[key].double(), want, rtol=1e-4, atol=1e-4)
