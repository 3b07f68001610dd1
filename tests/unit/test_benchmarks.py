"""The kernels' benchmarks: what their command lines say."""

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
