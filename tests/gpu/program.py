"""Starts the programs of the GPU tests, as a user does."""

import os
import subprocess
import sys
from collections.abc import Collection

from tests.megatron.common.launch import ROOT


def printed(
    *command: str, timeout: float = 240, without: Collection[str] = (), **environment: str
) -> str:
    """What Python prints, standard output and error together; the command as after `python`.

    Args:
        timeout: seconds.
        without: variables of this process's environment that are not handed on.
        environment: variables beside the others.

    Raises:
        AssertionError: it failed; shows the end of what it printed.
    """
    kept = {name: value for name, value in os.environ.items() if name not in without}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
