"""`launch` gives the driver what Triton itself gives it, at every place that calls it."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from megatron_mhc.kernels import Mixing
from megatron_mhc.kernels.triton import launch
from tests.triton_driver import Driver, active, launched, modules

OPTIONS = {"num_warps", "num_stages", "maxnreg"}
FLOATS = {"norm_eps", "pre_eps"}
"""Triton compiles a kernel for a float once, whatever its value."""


def calls() -> Iterator[tuple[JITFunction, ast.Call]]:
    """Every call of `launch` in the package, with the kernel that it names."""
    for module in modules().values():
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "launch":
                yield vars(module)[ast.unparse(node.args[0])], node


def test_every_launch_has_arguments_first_and_constants_by_name() -> None:
    found = list(calls())
    assert len({kernel.__name__ for kernel, _ in found}) == 12
    for kernel, call in found:
        arguments = [p for p in kernel.params if not p.is_constexpr]
        assert [p.name for p in kernel.params[: len(arguments)]] == [p.name for p in arguments]
        assert len(call.args) - 2 == len(arguments), kernel.__name__
        named = {keyword.arg for keyword in call.keywords} - OPTIONS
        assert named == {p.name for p in kernel.params if p.is_constexpr}, kernel.__name__
        for p in arguments:
            told = p.name.endswith(("_ptr", "_ptrs")) or p.name in FLOATS or p.do_not_specialize
            assert told, f"{kernel.__name__} would be compiled for each {p.name}"


KERNEL = modules()["passes.sums"].sum_mixing_kernel
GIVEN = {"BW": 128, "N": 4, "num_warps": 4, "BB": 16, "BLOCKS": 64}


def test_constants_are_put_in_the_kernels_order() -> None:
    assert launch._constants(KERNEL, (None, None, None, 5), GIVEN) == [4, 64, 16, 128]


@pytest.mark.parametrize("arguments", [(None, None, None, 5, 4), (None, 7, None, 5)])
def test_what_triton_would_compile_anew_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=r"sum_mixing_kernel: (N|d_post_ptr) is compiled for each"):
        launch._constants(KERNEL, arguments, GIVEN)


def comparable(value: Any) -> Any:
    """Equal for what is the same to a driver: tensors by address, hooks' lazy data by content."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.dtype
    if isinstance(value, tuple):
        return tuple(map(comparable, value))
    return getattr(value, "data", value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a driver of its own")
def test_a_direct_launch_is_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, absent tensors, tuples of tensors, one and three dimensions of a grid."""
    monkeypatch.setattr(launch, "_compiled", {})
    compared = []

    def both(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        launched.clear()
        kernel[grid](*arguments, **constants)
        for _ in range(2):  # it compiles, then launches directly
            launch.launch_here(0, kernel, grid, arguments, constants)
        triton, first, direct = map(comparable, map(tuple, launched))
        assert triton == first == direct
        compared.append(kernel.__name__)

    for module in modules().values():
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", both)
    monkeypatch.setattr(*active(), Driver())
    operations = modules()["operations"]
    logits = torch.zeros(5, 4, 4)
    operations.sinkhorn(logits, 3, 0.0)
    x, f, h_post = torch.zeros(5, 4, 16), torch.zeros(5, 16), torch.zeros(5, 4)
    operations.aggregate(x[:0], h_post[:0])
    operations.aggregate(x, h_post)
    operations.rebuild(x, [h_post] * 3, [Mixing(f, h_post, logits)] * 2)
    modules()["passes.sums"].sum_rows(torch.zeros(7, 40), torch.zeros(40))
    modules()["launch"].pack_weights(torch.zeros(24, 64), torch.bfloat16)
    assert set(compared) == {
        *("sinkhorn_kernel", "aggregate_kernel", "rebuild_kernel"),
        *("sum_rows_kernel", "pack_kernel"),
    }


def test_a_kernel_is_compiled_for_what_triton_looks_at() -> None:
    """The kinds of `launch` are Triton's own: whether 16 bytes divide a pointer, and so on."""
    aligned = torch.zeros(64)
    kinds = [
        launch._kind(value)
        for value in (aligned, aligned[1:], aligned.bfloat16(), None, 1, 2**31, 0.5, (aligned,))
    ]
    assert len(set(kinds)) == len(kinds)
    assert launch._kind(16) == launch._kind(1)
    assert launch._kind(aligned[4:]) == launch._kind(aligned)
