"""Starts the processes of the tests: real Megatron-Core models on the CPU, over gloo."""

import functools
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.megatron.common.fork_client import NAME, Fork, stage_of

ROOT = Path(__file__).parents[3]
# of a launcher, and what would let ranks write into each other's lines
NOT_KEPT = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "PYTHONUNBUFFERED",
}
RUNNER = ("-m", "megatron_mhc.run", "--cpu")


def quiet(**more: str) -> dict[str, str]:
    """This process's environment without a launcher's variables: one thread, no GPU."""
    kept = {name: value for name, value in os.environ.items() if name not in NOT_KEPT}
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    return kept | alone | more


def cold_python(
    *command: str, timeout: float = 200, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Python as a user starts it; standard output and error together."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=quiet(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def torchrun(processes: int, *command: str, timeout: float = 300, **environment: str) -> str:
    """Run a Python program in several processes, as a user does.

    Returns:
        Standard output and error together.

    Raises:
        AssertionError: it failed; shows the end of what it printed.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    finished = cold_python(*launcher, *command, timeout=timeout, **environment)
    assert finished.returncode == 0, f"{' '.join(command)} failed:\n{finished.stdout[-6000:]}"
    return finished.stdout


@functools.cache
def _forks() -> tuple[subprocess.Popen[str], str]:
    """The process that others are forked from, and its folder; it ends when this one does."""
    folder = tempfile.mkdtemp(prefix="forks-")
    with Path(folder, "errors").open("w") as errors:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.megatron.common.forks", folder],
            cwd=ROOT,
            env=quiet(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    assert server.stdout is not None
    ready = server.stdout.readline()
    assert ready == "ready\n", Path(folder, "errors").read_text()[-3000:]
    python = Path(folder, NAME)
    client = Path(__file__).with_name("fork_client.py")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {client} {folder} "$@"\n')
    python.chmod(0o755)
    return server, folder


def forking_python() -> str:
    """A `python` for scripts and launchers: what it runs is a fork."""
    return str(Path(_forks()[1], NAME))


def end_forks() -> None:
    """End that process, if it was ever started, and all that it has forked."""
    if _forks.cache_info().currsize:
        server, folder = _forks()
        server.communicate(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
        _forks.cache_clear()


def _wait(forks: list[Fork], seconds: float) -> int:
    """The first exit status that is not 0 (the others are killed then), or 0."""
    status, limit = 0, time.monotonic() + seconds
    with selectors.DefaultSelector() as running:
        for fork in forks:
            running.register(fork, selectors.EVENT_READ)
        while running.get_map():
            ended = running.select(None if status else max(0, limit - time.monotonic()))
            for key, _ in ended:
                running.unregister(key.fileobj)
                code = key.fileobj.wait()  # type: ignore[union-attr]
                status = status or code
            if status or not ended:
                status = status or TIMED_OUT
                for key in running.get_map().values():
                    key.fileobj.kill()  # type: ignore[union-attr]
    return status


TIMED_OUT = -14
"""The status of what was killed for its time: SIGALRM's."""


def forked(
    processes: int,
    *command: str,
    stage: str | None = None,
    seconds: float = 120,
    **environment: str,
) -> tuple[int, str]:
    """Run `python COMMAND`, as torchrun would in several processes, without start and imports.

    Args:
        processes: how many; 0: one, without what a launcher sets.
        command: what follows `python`.
        stage: which of `forks`; None: by the command (`stage_of`).
        seconds: after which it is killed.

    Returns:
        The exit status (minus a signal, `TIMED_OUT`) and all that was printed.
    """
    _, folder = _forks()
    stage = stage or stage_of(list(command))
    with socket.socket() as held, tempfile.TemporaryFile("w+") as log, open(os.devnull) as nothing:
        # bound until the run ends, so that nobody else is given the port before rank 0 listens
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
        job |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        # each writes where the file ends by then
        output = os.open(f"/proc/self/fd/{log.fileno()}", os.O_WRONLY | os.O_APPEND)
        files = (nothing.fileno(), output, output)
        forks = []
        for rank in range(processes or 1):
            ranks = job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes else {}
            own = quiet(**(ranks | environment))
            forks.append(Fork(folder, stage, list(command), own, str(ROOT), files))
        os.close(output)
        status = _wait(forks, seconds)
        log.seek(0)
        return status, log.read()


def forked_python(
    *command: str, stage: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`cold_python`, but for the start and the imports of one that has them."""
    status, printed = forked(0, *command, stage=stage, **environment)
    return subprocess.CompletedProcess(command, status, printed)


def forked_run(
    processes: int, *command: str, runner: bool = True, **environment: str
) -> tuple[int, str]:
    """Run a training script on the CPU; its exit status and all that it printed.

    Args:
        processes: how many.
        command: the script and its flags.
        runner: through `megatron_mhc.run --cpu`; else the script alone, inside the stand-in.
    """
    whole = (*RUNNER, *command) if runner else command
    status, printed = forked(processes, *whole, stage="megatron", **environment)
    if status < 0:  # the others then print that they miss it, and nothing says why
        printed += f"\na process was ended by {signal.Signals(-status).name}"
        printed += ": it took too long" if status == TIMED_OUT else ""
    return status, printed


@functools.cache
def _work(processes: int, worker: str, scenarios: str) -> dict[str, Any] | str:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.pt")
        command = ("-m", f"tests.megatron.{worker}", scenarios, str(result))
        status, printed = forked(processes, *command, stage="megatron", seconds=300)
        if status:
            # kept too, so that a failure is not run again for every test
            return f"{worker} ended with status {status}:\n{printed[-6000:]}"
        return torch.load(result, weights_only=False)


def run_scenarios(
    processes: int, scenarios: dict[str, dict[str, Any]], worker: str = "common.worker"
) -> dict[str, Any]:
    """Train each scenario in one launch of a worker; see `scenario.Scenario` for what it may set.

    Returns:
        For each name what the worker's `run` returned on rank 0. Equal calls are run once.

    Raises:
        AssertionError: a process failed; shows what it printed.
    """
    result = _work(processes, worker, json.dumps(scenarios, sort_keys=True))
    assert not isinstance(result, str), result
    return result
