"""The kernels' benchmarks: what their command lines say, and how they count."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
PROFILE = Path(__file__).parents[2] / "benchmarks" / "profile_site.py"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--help"], 0, "A tile is tokens,channels,splits,warps,stages"),
        (["--tiles", "projct=16,64"], 2, "'projct=16,64' names none of the kernels project, "),
        (["--tiles", "project=16"], 2, "'16' is no tile: give tokens,channels["),
    ],
)
def test_profile_site_says_how_it_is_called(arguments: list[str], status: int, says: str) -> None:
    command = [sys.executable, str(PROFILE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status and says in done.stdout + done.stderr


def test_times_of_a_sites_kernels_are_medians_over_equal_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(PROFILE.parent))
    medians = importlib.import_module("site_kernels").medians
    # two launches of "a" around one of "b" in each of three steps; 1, 2 and 4 between them
    steps = [
        [(at, at + 3.0, "a"), (at + 4, at + 9, "b"), (at + 9 + gap, at + 11 + gap, "a")]
        for at, gap in ((0.0, 0.0), (50.0, 1.0), (100.0, 3.0))
    ]
    records = [record for step in steps for record in step]
    assert medians(records, 3) == {"a": 5.0, "b": 5.0, "between kernels": 2.0}
    for other in ([], records[:-1], [*records[:-1], (112.0, 114.0, "c")]):
        with pytest.raises(RuntimeError, match="not the same ones each time"):
            medians(other, 3)


def test_pieces_moves_every_element() -> None:
    """Under the interpreter: a stub of a tile, of a block, and fewer tiles than programs."""
    program = """
import torch
from pieces import run
x = torch.randn(37, 4, 40)
f = torch.randn(37, 40)
for programs in (1, 2, 9):
    for neighbours in (False, True):
        y = torch.full_like(x, torch.nan)
        run(x, f, y, channels=32, programs=programs, tokens=8, neighbours=neighbours)
        assert torch.equal(y, x + f[:, None])
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", program]
    subprocess.run(command, check=True, cwd=PROFILE.parent, env=environment)
