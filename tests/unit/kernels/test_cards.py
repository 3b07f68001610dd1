"""Every kernel fits every card: compiled without it, as far as its shared memory is known.

What is compiled is what the operations launch, with the tiles that the card gets. All of it takes
more than half an hour of one core (`make test-cards`); `make test-all` has what is largest.
"""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.nvidia.compiler import CUDABackend

from megatron_mhc.kernels.triton import launch
from tests.kernel_cases import CARDS, OPERATIONS
from tests.triton_driver import call, modules, use_card

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ALL = tuple(itertools.product(CARDS, (1, 2, 4, 8), DTYPES, (*OPERATIONS, "rebuild")))
LARGEST = (
    # combine_pre has all kernels but sinkhorn's and rebuild's, pre the same in less time
    *((card, 8, dtype, "pre") for card in ("L40S", "RTX5090") for dtype in ("bf16", "fp32")),
    ("A100", 8, "fp32", "pre"),
    ("A100", 4, "bf16", "combine_pre"),
    ("L40S", 4, "bf16", "combine_pre"),
    ("B200", 4, "bf16", "pre"),
    # the same kernels with what a delayed site reads
    ("L40S", 4, "bf16", "combine_read"),
)

FEW = (("L40S", 8, "fp32", "pre"),)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the kernels that are compiled, as far as LLVM's code of them."""
    names: list[str] = []
    stages_of = CUDABackend.add_stages

    def add_stages(self: CUDABackend, stages: dict[str, Any], *arguments: Any) -> None:
        def no_ptx(_: Any, metadata: dict[str, Any]) -> str:
            metadata["name"] = "not assembled"
            return ""

        stages_of(self, stages, *arguments)
        stages.update(ptx=no_ptx, cubin=lambda *_: b"")

    through_triton = launch.through_triton

    def for_card(kernel: Any, *arguments: Any) -> Any:
        names.append(kernel.__name__)
        return through_triton(kernel, *arguments)

    monkeypatch.setattr(CUDABackend, "add_stages", add_stages)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nobody else is to find these
    monkeypatch.setattr(launch, "through_triton", for_card)
    return names


def case(values: tuple[Any, ...]) -> Any:
    """With a name that says all; where all cards are not asked for, few are not thorough."""
    marks = () if values in FEW or os.environ.get("ALL_CARDS") else (pytest.mark.thorough,)
    return pytest.param(*values, id="-".join(map(str, values)), marks=marks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a driver of its own")
@pytest.mark.parametrize(
    ("card", "n", "dtype", "operation"), map(case, ALL if os.environ.get("ALL_CARDS") else LARGEST)
)
def test_fits(
    card: str,
    n: int,
    dtype: str,
    operation: str,
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton refuses what wants more shared memory than the driver says there is."""
    use_card(card, monkeypatch.setattr)
    call(operation, n, DTYPES[dtype])
    assert compiled


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a driver of its own")
def test_the_operations_have_all_kernels(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is compiled once here, as the first operation launches it."""
    compile_one = launch.through_triton

    def compile_once(kernel: Any, *arguments: Any) -> Any:
        return None if kernel.__name__ in compiled else compile_one(kernel, *arguments)

    monkeypatch.setattr(launch, "through_triton", compile_once)
    use_card("L40S", monkeypatch.setattr)
    for operation in (*OPERATIONS, "rebuild"):
        call(operation, 1, torch.bfloat16)
    of_modules = {
        name for module in modules().values() for name in vars(module) if name.endswith("_kernel")
    }
    assert set(compiled) == of_modules
