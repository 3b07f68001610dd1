"""The kernels under Triton's interpreter, on the CPU: every file in a process of its own.

The interpreter is chosen when triton is imported, and the tests outside want the compiler. So each
file here is one test of an ordinary run: a process with TRITON_INTERPRET=1 that runs it. To choose
among its tests, set that variable yourself:

    TRITON_INTERPRET=1 python -m pytest tests/unit/kernels/interpreted/test_pre.py -k no_tokens
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron.common.launch import end_forks, forked

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Process(pytest.Item):
    """A file's tests, in a process that imports triton with the interpreter."""

    def runtest(self) -> None:
        """Run them, and fail with what they print."""
        pytest.importorskip("triton")
        chosen = ["-m", expression] if (expression := self.config.option.markexpr) else []
        command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, str(self.path))
        # a fork of a process that has PyTorch, and not triton
        environment = {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "0"}
        status, printed = forked(0, *command, stage="torch", seconds=600, **environment)
        if status != 0:
            pytest.fail(printed[-7000:], pytrace=False)
        print(*printed.splitlines()[-1:])  # how many there were, for -rA

    def reportinfo(self) -> tuple[Path, int, str]:
        """As pytest names it where it fails."""
        return self.path, 0, f"{self.path.name} under the interpreter"


class File(pytest.File):
    """A file that this process does not import."""

    def collect(self) -> Iterator[Process]:
        """Its one test."""
        yield Process.from_parent(self, name="in_an_interpreted_process")


if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    def patch_once(fn: Any, patch: Callable[[Any], Any] = interpreter._patch_lang) -> Any:
        """A launch changes Triton's language for its time. Each call of a device function looks
        all through it again, a third of these tests' time, and finds it changed."""
        seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        unchanged = any(tl.core.is_builtin(module.load) for module in seen)
        return patch(fn) if unchanged else None

    interpreter._patch_lang = patch_once

    @pytest.fixture(autouse=True)
    def poisoned_memory() -> Iterator[None]:
        """New tensors are full of NaN, so that a value nobody wrote shows."""
        torch.use_deterministic_algorithms(True)
        assert bool(torch.empty(1).isnan())
        yield
        torch.use_deterministic_algorithms(False)

else:

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        """These first: each is a minute of one processor, and would run alone at the end."""
        items.sort(key=lambda item: not isinstance(item, Process))

    def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> File:
        """A process in place of the module."""
        return File.from_parent(parent, path=module_path)

    def pytest_unconfigure() -> None:
        """No process outlives the run."""
        end_forks()
