"""`Launch` gives the driver what Triton itself gives it, whichever operation launches."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.runtime.jit import JITFunction

from megatron_mhc.kernels import Mixing
from megatron_mhc.kernels.arguments import Sizes
from megatron_mhc.kernels.triton import launch
from megatron_mhc.kernels.triton.launch import Launch
from tests.triton_driver import Driver, active, launched, modules

OPTIONS = {"num_warps", "num_stages", "maxnreg"}
FLOATS = {"norm_eps", "pre_eps"}
"""Triton compiles a kernel for a float once, whatever its value."""
CPU = torch.device("cpu")


def kernels() -> Iterator[tuple[JITFunction, set[str]]]:
    """Every kernel of a `Launch` in the package, with the constants that it is given."""
    for module in modules().values():
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Launch":
                given = {keyword.arg for keyword in node.keywords} - OPTIONS - {"groups"}
                sizes = {"N", "BLOCKS", "WIDTH", "FIRST", "BB", "BR", "BW"} if None in given else {}
                for name in ast.walk(node.args[0]):
                    if isinstance(name, ast.Name) and name.id.endswith("_kernel"):
                        yield vars(module)[name.id], {str(g) for g in given if g} | {*sizes}


def test_every_launch_has_tensors_then_numbers_then_constants() -> None:
    found = dict(kernels())
    assert len(found) == 11
    for kernel, given in found.items():
        constants = {p.name for p in kernel.params if p.is_constexpr}
        assert constants <= given, kernel.__name__
        for p in kernel.params:
            is_tensor, is_count = p.name.endswith(("_ptr", "_ptrs")), p.do_not_specialize
            told = is_tensor or is_count or p.name in FLOATS or p.is_constexpr
            assert told, f"{kernel.__name__} would be compiled for each {p.name}"
        order = [
            p.is_constexpr * 3 or (p.name in FLOATS) * 2 or int(p.do_not_specialize)
            for p in kernel.params
        ]
        assert order == sorted(order) and order.count(1) >= 1, kernel.__name__


def comparable(value: Any) -> Any:
    """Equal for what is the same to a driver: tensors by address, and an absent one is nowhere."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, list | tuple):
        return tuple(map(comparable, value))
    return 0 if value is None else value


def what_a_driver_sees(record: tuple[Any, ...]) -> Any:
    """Without Triton's hooks, which are not called here."""
    name, *grid_to_metadata = record[:7]
    return comparable((name, *grid_to_metadata, *record[10:]))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """That of an H100, which only notes what it is given."""
    monkeypatch.setattr(*active(), Driver())
    launch.forget()
    launched.clear()
    yield
    launch.forget()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a driver of its own")
def test_a_direct_launch_is_tritons(monkeypatch: pytest.MonkeyPatch, driver: None) -> None:
    """Numbers, absent tensors, tuples of tensors, one and two dimensions of a grid."""
    compared, directly, through = [], Launch.__call__, launch.through_triton

    def both(self: Launch, grid: Any, tensors: Any, *numbers: Any) -> None:
        launched.clear()
        calls = []
        monkeypatch.setattr(launch, "through_triton", lambda *a: calls.append(1) or through(*a))
        for _ in range(3):  # Triton compiles it, then it is launched directly
            directly(self, grid, tensors, *numbers)
        assert len(calls) == (1 if self.kernel.__name__ not in compared else len(calls))
        assert len({what_a_driver_sees(record) for record in launched}) == 1
        compared.append(self.kernel.__name__)

    monkeypatch.setattr(Launch, "__call__", both)
    operations = modules()["operations"]
    logits = torch.zeros(5, 4, 4)
    operations.sinkhorn(logits, 3, 0.0)
    x, f, h_post = torch.zeros(5, 4, 16), torch.zeros(5, 16), torch.zeros(5, 4)
    operations.aggregate(x[:0], h_post[:0])
    operations.aggregate(x, h_post)
    operations.rebuild(x, [h_post] * 3, [Mixing(f, h_post, logits, b) for b in (None, f[0])])
    sums = modules()["passes.sums"]
    sums.add_up(sums.Rows(torch.zeros(7, 40), torch.zeros(40)))
    assert set(compared) == {
        *("sinkhorn_kernel", "aggregate_kernel", "rebuild_kernel", "add_up_kernel")
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a driver of its own")
def test_what_triton_compiles_anew_for_goes_through_it(
    monkeypatch: pytest.MonkeyPatch, driver: None
) -> None:
    """An address that 16 does not divide, a count of 64 bits, a profiler's hooks."""
    through, seen = launch.through_triton, []

    def note(*arguments: Any) -> Any:
        seen.append(arguments)
        return through(*arguments)

    monkeypatch.setattr(launch, "through_triton", note)
    kernel = modules()["passes.aggregate"].aggregate_kernel
    run = Launch(kernel, CPU, N=4, C=16, BT=4, BC=16, num_warps=4)
    x, h_pre, u = torch.zeros(6, 4, 16), torch.zeros(6, 4), torch.zeros(6, 16)
    off = torch.zeros(6 * 4 + 1)[1:]

    def called(tensors: tuple[torch.Tensor, ...], count: int) -> int:
        seen.clear()
        run((2, 1), tensors, count)
        return len(seen)

    usual = (x, h_pre, u)
    assert [called((x, off, u), 6), called(usual, 6), called(usual, 6)] == [1, 1, 0]
    assert [called((x, off, u), 6), called(usual, 2**31), called(usual, 6)] == [1, 1, 0]
    knobs.runtime.launch_exit_hook.add(hook := lambda *_: None)
    try:
        assert called(usual, 6) == 1
    finally:
        knobs.runtime.launch_exit_hook.remove(hook)
    assert called(usual, 6) == 0


def test_a_launch_is_made_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another dtype, device, shape, absent tensor or dtype of f_bias is another `Launch`: addresses
    say nothing of these."""
    made: list[Any] = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *_: made.append(self))
    passes = modules()
    f, h_post, h_res = torch.zeros(5, 16), torch.zeros(5, 4), torch.zeros(5, 4, 4)
    x, phi, bias = torch.zeros(5, 4, 16), torch.zeros(24, 64), torch.zeros(24)
    sizes, alpha = Sizes.of(x), torch.zeros(3)
    project = passes["passes.projection"].combine_and_project
    for dtype in (torch.float32, torch.bfloat16):
        project(sizes, x.to(dtype), phi, None)
        project(sizes, x.to(dtype), None, Mixing(f.to(dtype), h_post, h_res))
        for f_bias in (f[0], f[0].bfloat16(), None):
            project(sizes, x.to(dtype), phi, Mixing(f.to(dtype), h_post, h_res, f_bias))
    token = passes["passes.coefficient_gradients"]
    for given in ({"du": f}, {"d_pre": h_post}, {"du": f, "d_post": h_post}, {"d_res": h_res}):
        options = passes["pre"].DEFAULT
        out = token.coefficient_gradients(
            sizes, x, torch.zeros(5, 25), alpha, bias, options, **given
        )
        gradients = passes["passes.stream_gradients"].stream_gradients
        gradients(sizes, x, du=given.get("du"), phi=phi, token=out)
        gradients(sizes, x, dy=x, du=given.get("du"), phi=phi, token=out)
    by_kernel: dict[str, set[int]] = {}
    for one in made:
        by_kernel.setdefault(one.kernel.__name__, set()).add(id(one))
    counts = {name: len(which) for name, which in by_kernel.items()}
    assert counts["combine_and_project_kernel"] == 10
    # du or not, and d_post and d_res; dy or not, and du or not
    assert counts["coefficient_gradients_kernel"] == 4 and counts["stream_gradients_kernel"] == 4
