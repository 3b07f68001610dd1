"""`python -m megatron_mhc` alone: a screen that teaches."""

import signal
import subprocess
import sys

import pytest

import megatron_mhc
from tests.megatron.common.launch import forked_python


@pytest.mark.parametrize("asked", [[], ["-h"], ["--help"]], ids=str)
def test_alone_it_fills_a_screen(asked: list[str]) -> None:
    result = forked_python("-m", "megatron_mhc", *asked)
    assert result.returncode == 0, result.stdout
    lines = result.stdout.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    for way in ("-m megatron_mhc.run", "import megatron_mhc.auto", "--spec megatron_mhc.spec"):
        assert way in result.stdout
    for tool in ("doctor", "doctor --args", "convert SOURCE TARGET", "plot RUN"):
        assert f"\n  {tool} " in result.stdout
    assert "--version" in result.stdout
    assert "megatron_mhc.run --help" in result.stdout and "README.md" in result.stdout


def test_it_says_its_version() -> None:
    result = forked_python("-m", "megatron_mhc", "--version")
    assert result.stdout == f"megatron_mhc {megatron_mhc.__version__}\n"


def test_a_reader_that_has_read_enough_ends_it_quietly() -> None:
    """As `head` does: no traceback of a pipe that is broken."""
    started = subprocess.Popen(
        [sys.executable, "-m", "megatron_mhc"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert started.stdout and started.stderr
    started.stdout.close()  # long before anything is printed
    errors = started.stderr.read().decode()
    assert (
        started.wait() == -signal.SIGPIPE and "Traceback" not in errors and "Broken" not in errors
    )


def test_a_tool_that_does_not_exist_is_refused_with_the_names_of_all() -> None:
    result = forked_python("-m", "megatron_mhc", "heal")
    assert result.returncode == 2
    assert "invalid choice: 'heal'" in result.stdout
    assert all(tool in result.stdout for tool in ("doctor", "plot", "convert"))
