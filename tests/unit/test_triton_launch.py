"""What `launch` relies on in every kernel: the order of parameters, and none is specialized."""

import importlib
import pkgutil
from typing import Any

import pytest

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from megatron_mhc import kernels
from megatron_mhc.kernels import triton_launch

SMALL = {"norm_eps", "pre_eps"}
"""Floats, which Triton compiles a kernel for once, whatever their value."""


def launched() -> dict[str, Any]:
    """Every kernel of the package: what is compiled on its own, not called by another."""
    found = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.name.startswith("triton_"):
            members = vars(importlib.import_module(f"megatron_mhc.kernels.{module.name}"))
            found |= {name: f for name, f in members.items() if name.endswith("_kernel")}
    return found


def test_constants_stand_behind_arguments_that_are_not_specialized() -> None:
    found = launched()
    assert len(found) >= 11
    for name, kernel in found.items():
        assert isinstance(kernel, JITFunction), name
        constant = [parameter.is_constexpr for parameter in kernel.params]
        assert constant == sorted(constant), f"{name}: a constant before an argument"
        for parameter in kernel.params:
            pointer = parameter.name.endswith(("_ptr", "_ptrs"))
            told = pointer or parameter.is_constexpr or parameter.name in SMALL
            assert told or parameter.do_not_specialize, f"{name}: {parameter.name}"


def test_constants_are_put_in_the_kernels_order() -> None:
    kernel = launched()["sum_mixing_kernel"]
    given = {"BW": 128, "N": 4, "num_warps": 4, "BB": 16, "BLOCKS": 64}
    assert triton_launch._constants(kernel, (None, None, None, 5), given) == [4, 64, 16, 128]


@pytest.mark.parametrize("arguments", [(None, None, None, 5, 4), (None, 7, None, 5)])
def test_what_triton_would_compile_anew_is_refused(arguments: tuple[Any, ...]) -> None:
    kernel = launched()["sum_mixing_kernel"]
    given = {"BW": 128, "N": 4, "BB": 16, "BLOCKS": 64}
    with pytest.raises(TypeError, match=r"sum_mixing_kernel: (N|d_post_ptr) is compiled for each"):
        triton_launch._constants(kernel, arguments, given)
