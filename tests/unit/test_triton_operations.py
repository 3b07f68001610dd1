"""The Triton operations against float64, on the CPU through Triton's interpreter.

The interpreter is chosen when triton is imported, so the tests below run in a process of their own
with TRITON_INTERPRET=1; in any other process this file has the one test that starts it.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from megatron_mhc import kernels

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:

    def test_all_in_an_interpreted_process() -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]

else:
    from typing import Any

    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    from megatron_mhc.kernels import triton_config as config
    from megatron_mhc.kernels import triton_projection
    from tests.kernel_cases import (
        DEEPSEEK,
        LARGE_EPS,
        OPERATIONS,
        PAPER,
        check,
        check_rebuild,
        inputs,
        run,
        settings,
    )
    from tests.unit.test_recompute import Layers

    CASES = (
        # tokens, n, width, convention, iterations: an odd width, several tiles, every n
        (5, 4, 131, PAPER, 20),
        (1, 1, 33, DEEPSEEK, 2),
        (9, 2, 40, DEEPSEEK, 3),
        (3, 8, 40, PAPER, 1),
        (4, 4, 48, LARGE_EPS, 4),
    )

    @pytest.fixture(autouse=True)
    def poisoned_memory() -> Iterator[None]:
        """New tensors are full of NaN, so that a value nobody wrote shows."""
        torch.use_deterministic_algorithms(True)
        assert bool(torch.empty(1).isnan())
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: f"T{case[0]}-n{case[1]}-C{case[2]}")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_results_and_gradients(operation: str, dtype: torch.dtype, case: tuple) -> None:
        tokens, n, width, convention, iterations = case
        check(operation, tokens, n, width, dtype, "cpu", convention, iterations)

    @pytest.mark.parametrize(
        ("dtype", "finish_tokens", "splits"),
        [(torch.bfloat16, 8, 1), (torch.float32, 8, 2), (torch.bfloat16, 64, 2)],
    )
    def test_a_program_goes_through_several_tiles(
        dtype: torch.dtype, finish_tokens: int, splits: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One or two programs share the tokens, every tile or every other; `finish` has a quarter
        of a tile of `project` a program, or a whole. The last block of channels is a stub."""
        for kernel in ("project", "streams_backward", "phi_gradient"):
            tile = dataclasses.replace(getattr(config, kernel)(4, 168, dtype), splits=splits)
            assert splits * tile.tokens < 133
            monkeypatch.setattr(config, kernel, lambda *_, tile=tile: tile)
        monkeypatch.setattr(config, "finish", lambda *_: config.Tile(finish_tokens, 1, warps=1))
        monkeypatch.setattr(triton_projection, "MOST_PROGRAMS", splits)
        check("combine_pre", 133, 4, 168, dtype, "cpu", iterations=2)
        check("combine", 133, 4, 168, dtype, "cpu")

    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_no_tokens(operation: str) -> None:
        arguments = inputs(operation, 0, 4, 24, torch.bfloat16, "cpu")
        out = run(getattr(kernels, operation), arguments, backend="triton")
        torch.autograd.backward(out, [torch.ones_like(result) for result in out])
        for name, argument in arguments.items():
            assert argument.grad.shape == argument.shape, name
            assert bool((argument.grad == 0).all()), name

    def test_boundary_equals_its_halves_to_the_bit() -> None:
        arguments = inputs("combine_pre", 7, 4, 72, torch.bfloat16, "cpu")
        y, *rest = kernels.combine_pre(**arguments, backend="triton")
        first = {name: arguments[name] for name in ("x", "f", "h_post", "h_res", "f_bias")}
        assert torch.equal(y, kernels.combine(**first, backend="triton"))
        second = {name: arguments[name] for name in ("phi", "alpha", "bias")}
        for got, wanted in zip(rest, kernels.pre(y, **second, backend="triton"), strict=True):
            assert torch.equal(got, wanted)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize(
        "case", [(5, 4, 131, 7), (1, 1, 33, 1), (9, 2, 40, 2), (3, 8, 40, 6), (0, 4, 24, 3)]
    )
    def test_rebuild_equals_the_forward_to_the_bit(case: tuple, dtype: torch.dtype) -> None:
        """One site alone, several launches, an odd width, every n, no tokens."""
        check_rebuild(*case, dtype, "cpu")

    def test_strided_arguments_and_leading_dimensions() -> None:
        arguments = inputs("combine_pre", 6, 2, 20, torch.float32, "cpu")
        flat = kernels.combine_pre(**arguments, backend="triton")
        spread = dict(arguments)
        for name in ("x", "f", "h_post", "h_res"):
            tensor = arguments[name].detach()
            strided = tensor.reshape(2, 3, *tensor.shape[1:]).transpose(0, 1).contiguous()
            spread[name] = strided.transpose(0, 1)  # [2, 3, ...] over another memory order
            assert not spread[name].is_contiguous()
        for got, wanted in zip(kernels.combine_pre(**spread, backend="triton"), flat, strict=True):
            assert torch.equal(got.reshape(wanted.shape), wanted)

    def test_half_of_the_gradients_is_absent() -> None:
        for index in range(4):
            arguments = inputs("combine_pre", 4, 4, 40, torch.float32, "cpu")
            exact = {k: v.detach().double().requires_grad_() for k, v in arguments.items()}
            kernels.combine_pre(**arguments, backend="triton")[index].sum().backward()
            kernels.combine_pre(**exact, backend="torch")[index].sum().backward()
            for name, argument in arguments.items():
                if exact[name].grad is None:
                    continue
                # fp32 sums; a gradient that is exactly zero is measured absolutely
                error = (argument.grad - exact[name].grad).norm()
                assert error <= 1e-5 * (1 + exact[name].grad.norm()), (index, name)

    def test_large_logits_stay_doubly_stochastic() -> None:
        generator = torch.Generator().manual_seed(0)
        logits = (torch.rand(64, 4, 4, generator=generator) * 160 - 80).requires_grad_()
        for eps in (0.0, 1e-6):
            matrix = kernels.sinkhorn(logits, eps=eps, backend="triton")
            # four fp32 roundings of a row that adds up to one; eps itself in the other convention
            assert (matrix.sum(-1) - 1).abs().max() < 1e-6 + 5 * eps
            wanted = kernels.reference.sinkhorn(logits.double(), eps=eps)
            # a difference of up to 160 rounds by 2^-17; exp makes that relative to an entry m, and
            # m (1 - m) <= 1/4 of it is left in the matrix
            assert (matrix - wanted).abs().max() < 2e-6
            matrix.square().sum().backward()
            assert bool(torch.isfinite(logits.grad).all())

    def results_and_gradients(
        operation: str, arguments: dict[str, torch.Tensor], backend: str
    ) -> dict[str, torch.Tensor]:
        """What an operation returns for these values, and all gradients for a gradient of ones."""
        leaves = {k: v.detach().clone().requires_grad_() for k, v in arguments.items()}
        out = run(getattr(kernels, operation), leaves, backend=backend)
        torch.autograd.backward(out, [torch.ones_like(result) for result in out])
        results = {f"result {index}": result.detach() for index, result in enumerate(out)}
        return results | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}

    @pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=["inf", "nan"])
    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_what_is_not_finite_shows_and_stays_in_its_token(operation: str, bad: float) -> None:
        """A token's results and gradients are finite where the reference's are, and nowhere else.

        The reference runs in float64, where nothing overflows in between.
        """
        arguments = inputs(operation, 5, 4, 40, torch.float32, "cpu")
        a_token = [name for name, tensor in arguments.items() if tensor.shape[0] == 5]
        for name in {"x", "f", "h_post", "logits"} & set(a_token):
            spoilt = {k: v.detach().clone() for k, v in arguments.items()}
            spoilt[name][1].view(-1)[2] = bad
            got = results_and_gradients(operation, spoilt, "triton")
            exact = {k: v.double() for k, v in spoilt.items()}
            want = results_and_gradients(operation, exact, "torch")
            assert not all(bool(want[key].isfinite().all()) for key in want), name
            for key, tensor in got.items():
                if key.startswith("result") or key.removeprefix("d_") in a_token:
                    assert bool(tensor[[0, 2, 3, 4]].isfinite().all()), (name, key)
                finite = bool(want[key].isfinite().all())
                assert bool(tensor.isfinite().all()) == finite, (name, key)

    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_zero_streams(operation: str) -> None:
        """The norm of nothing: everything is finite, and the reference's in float64."""
        arguments = inputs(operation, 3, 4, 40, torch.float32, "cpu")
        zero = {
            name: torch.zeros_like(t) if name in ("x", "f", "logits") else t.detach()
            for name, t in arguments.items()
        }
        got = results_and_gradients(operation, zero, "triton")
        exact = {k: v.double() for k, v in zero.items()}
        for key, want in results_and_gradients(operation, exact, "torch").items():
            # the same sums in fp32; gradients of x are a thousand times those of ordinary streams
            torch.testing.assert_close(got[key].double(), want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("operation", ["coefficients", "pre", "combine_pre", "head"])
    def test_large_logits_saturate(operation: str) -> None:
        """Sigmoids of +-80 and a Sinkhorn of +-80: finite, and the reference's in float64."""
        arguments = {
            k: v.detach().clone()
            for k, v in inputs(operation, 3, 4, 40, torch.float32, "cpu").items()
        }
        bias = arguments["base" if operation == "head" else "bias"]
        signs = torch.randn(bias.shape, generator=torch.Generator().manual_seed(5)).sign()
        bias.add_(80 * signs)
        got = results_and_gradients(operation, arguments, "triton")
        exact = {k: v.double() for k, v in arguments.items()}
        for key, want in results_and_gradients(operation, exact, "torch").items():
            # a logit of 80 rounds by 2^-18, which a sigmoid or a matrix entry scales by <= 1/4;
            # sums of some hundred such terms
            torch.testing.assert_close(got[key].double(), want, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("f_bias", [True, False], ids=["f_bias", "no f_bias"])
    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_operators_are_what_they_say(operation: str, f_bias: bool) -> None:
        """Schemas, fake tensors and autograd of every registered operator, as PyTorch checks them.

        Each is caught in a call of the operation that it serves, forward and backward.
        """
        arguments = inputs(operation, 3, 4, 24, torch.bfloat16, "cpu")
        if not f_bias and arguments.pop("f_bias", None) is None:
            return  # the operation has none: the other case is all of it
        calls: dict[str, tuple[Any, tuple]] = {}

        class Catch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                if function.namespace == "megatron_mhc":
                    copies = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args)
                    calls[function.name()] = (function, copies)
                return function(*args, **(kwargs or {}))

        with Catch():
            out = run(getattr(kernels, operation), arguments, backend="triton")
            torch.autograd.backward(out, [torch.ones_like(result) for result in out])
        assert {name.endswith("_backward") for name in calls} == {True, False}, list(calls)
        torch.use_deterministic_algorithms(False)  # the checks compare two calls' empty results
        for function, args in calls.values():
            backward = function.name().endswith("_backward")
            args = tree_map_only(torch.Tensor, lambda t: t.requires_grad_(not backward), args)  # noqa: B023
            torch.library.opcheck(
                function,
                args,
                test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
            )

    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_directly_and_as_operators_alike(operation: str) -> None:
        """What torch.compile traces and what a training step calls: the same bits."""
        found = []
        for watched in (False, True):
            names = set()

            class Watch(TorchDispatchMode):
                def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                    names.add(function.namespace)  # noqa: B023
                    return function(*args, **(kwargs or {}))

            arguments = inputs(operation, 5, 4, 40, torch.bfloat16, "cpu")
            with Watch() if watched else contextlib.nullcontext():
                out = run(getattr(kernels, operation), arguments, backend="triton")
                torch.autograd.backward(out, [torch.ones_like(result) for result in out])
            assert ("megatron_mhc" in names) == watched
            found.append([*out, *(argument.grad for argument in arguments.values())])
        for direct, traced in zip(*found, strict=True):
            assert torch.equal(direct, traced)

    def test_recompute_over_the_kernels_is_exact() -> None:
        """Dropped, rebuilt, and the bits of a run that keeps all."""
        found = []
        for recompute in (False, True):
            torch.manual_seed(3)
            model = Layers(recompute, "triton", torch.bfloat16)
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(3, 1, 32, generator=generator).bfloat16().requires_grad_()
            normed: list[torch.Tensor] = []
            result = model(x, normed)
            kept = [tensor.untyped_storage().nbytes() for tensor in normed]
            assert all(kept) if not recompute else not any(kept)
            result.float().square().sum().backward()
            gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
            found.append([result.detach(), *gradients])
        for kept_all, rebuilt in zip(*found, strict=True):
            assert torch.equal(kept_all, rebuilt)

    @pytest.mark.parametrize("traced", [False, True])
    def test_a_gradients_gradient_is_refused(traced: bool) -> None:
        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                return function(*args, **(kwargs or {}))

        x, h_pre = torch.randn(2, 4, 8), torch.rand(2, 4)
        with Watch() if traced else contextlib.nullcontext():
            u = kernels.aggregate(x.requires_grad_(), h_pre.requires_grad_(), backend="triton")
            (dx,) = torch.autograd.grad(u.square().sum(), x, create_graph=True)
            with pytest.raises(RuntimeError):  # and not the other terms' gradient alone
                (dx + x).sum().backward()

    def test_compiles_as_one_graph() -> None:
        """torch.compile finds operators, and nothing that it cannot trace."""
        plain = inputs("combine_pre", 5, 4, 40, torch.bfloat16, "cpu")
        traced = {name: t.detach().clone().requires_grad_() for name, t in plain.items()}

        def site(**arguments: torch.Tensor) -> torch.Tensor:
            return sum(t.float().sum() for t in kernels.combine_pre(**arguments, backend="triton"))

        site(**plain).backward()
        torch.compile(site, fullgraph=True, backend="aot_eager")(**traced).backward()
        for name, tensor in traced.items():
            assert torch.equal(tensor.grad, plain[name].grad), name

    def test_float64_is_refused_and_left_to_the_reference() -> None:
        x, h_pre = torch.randn(2, 4, 8).double(), torch.rand(2, 4).double()
        with pytest.raises(ValueError, match="float64"):
            kernels.aggregate(x, h_pre, backend="triton")
        assert kernels.aggregate(x, h_pre).dtype == torch.float64

    def test_saved_tensors_are_few() -> None:
        """Beside x, f, y: at most 256 bytes a token, and no fp32 tensor as wide as the streams."""
        tokens, n, width = 16, 4, 256
        arguments = inputs("combine_pre", tokens, n, width, torch.bfloat16, "cpu")
        saved: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y, *_ = kernels.combine_pre(**arguments, backend="triton")
        streams = {arguments["x"].data_ptr(), arguments["f"].data_ptr(), y.data_ptr()}
        a_token = [t for p, t in saved.items() if t.shape[:1] == (tokens,) and p not in streams]
        assert sum(t.nbytes for t in a_token) <= 256 * tokens
        assert all(t.numel() < tokens * n * width for t in a_token)

    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_keywords_are_the_references(operation: str) -> None:
        import inspect

        from megatron_mhc.kernels import reference, triton_operations

        theirs = inspect.signature(getattr(reference, operation)).parameters
        ours = inspect.signature(getattr(triton_operations, operation)).parameters
        assert [(p.name, p.default, p.kind) for p in ours.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]
        assert set(settings(operation, PAPER, 20)) <= set(ours)

    @pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 24, 80])
    def test_every_row_is_projected_with_all_of_phi(rows: int) -> None:
        """All three bf16 terms of phi, each once: one left out or twice is 2e-6 or more off."""
        n = {24: 4, 80: 8}.get(rows, min(rows, 2))
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(35, n, 40, generator=generator).bfloat16()
        phi = torch.randn(rows, n * 40, generator=generator)
        _, partial = triton_projection.project(x, phi, None)
        got = partial.double().sum(1).transpose(1, 2).flatten(0, 1)[:35]
        wide = x.double().flatten(1)
        wanted = torch.cat((wide @ phi.double().t(), wide.square().sum(1, keepdim=True)), dim=1)
        # fp32 sums of n*C terms
        assert bool(((got - wanted).norm(dim=0) < 5e-7 * wanted.norm(dim=0)).all())

    def test_phi_gradient_in_more_sums(monkeypatch: pytest.MonkeyPatch) -> None:
        """Many tokens are added up in sums that stay short: 26 of them here, one of them a stub."""
        from megatron_mhc.kernels import triton_phi_gradient

        generator = torch.Generator().manual_seed(0)
        y = torch.randn(805, 4, 8, generator=generator).bfloat16()
        d_z = torch.randn(805, 24, generator=generator)
        counts = []

        def counted(partial: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            counts.append(len(partial))
            return sum_rows(partial, out)

        sum_rows = triton_phi_gradient.sum_rows
        monkeypatch.setattr(triton_phi_gradient, "sum_rows", counted)
        monkeypatch.setattr(triton_phi_gradient, "LONGEST_SUM", 32)
        monkeypatch.setattr(config, "phi_gradient", lambda *_: config.Tile(32, 128, 4))
        got = triton_phi_gradient.phi_gradient(y, d_z).double()
        wanted = d_z.double().t() @ y.double().flatten(1)
        assert counts == [26]
        # fp32 sums of 805 terms
        assert (got - wanted).norm() < 1e-6 * wanted.norm()
