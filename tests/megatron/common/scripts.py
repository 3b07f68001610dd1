"""Runs the launch scripts of the examples, with a `python` whose processes are forks."""

import subprocess

import pytest

from megatron_mhc.patches.supported_versions import is_installed
from tests.megatron.common.launch import ROOT, forking_python, quiet

NEEDS_0_19 = pytest.mark.skipif(
    is_installed("<0.19"), reason="doctor --args is refused with Megatron 0.18"
)
EXAMPLES = ROOT / "examples"


def launch(script: str, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a launch script, from a folder that is not the repository's; its two outputs apart."""
    return subprocess.run(
        [EXAMPLES / script, *flags],
        cwd="/",
        env=quiet(**{"PYTHON": forking_python()} | settings),
        capture_output=True,
        text=True,
        timeout=300,
    )
