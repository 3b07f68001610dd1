"""Runs scenarios on real Megatron-Core models in CPU processes over gloo, and compares results."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[3]


def torchrun(processes: int, *command: str, timeout: int = 300, **environment: str) -> str:
    """Run a Python program in several processes.

    Returns:
        Standard output and error together.

    Raises:
        AssertionError: it failed; shows the end of what it printed.
    """
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), *command),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert finished.returncode == 0, f"{' '.join(command)} failed:\n{finished.stdout[-6000:]}"
    return finished.stdout


@functools.cache
def _run(processes: int, scenarios: str) -> dict[str, Any] | str:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.pt")
        try:
            torchrun(processes, "-m", "tests.megatron.common.worker", scenarios, str(result))
        except AssertionError as error:
            return str(error)  # kept too, so that a failure is not run again for every test
        return torch.load(result, weights_only=False)


def run_scenarios(processes: int, scenarios: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train each scenario in one torchrun; see `models.Scenario` for what a scenario may set.

    Returns:
        For each name what `worker.run` returned on rank 0. Equal calls are run once.

    Raises:
        AssertionError: a process failed; shows what it printed.
    """
    result = _run(processes, json.dumps(scenarios, sort_keys=True))
    assert not isinstance(result, str), result
    return result


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, and 0 where both are zero."""
    got, want = got.double(), want.double()
    norm = want.norm().item()
    error = (got - want).norm().item()
    return error / norm if norm else error


def assert_same_training(got: dict[str, Any], want: dict[str, Any], *, bound: float | None) -> None:
    """Losses of every step and every updated parameter agree: bit for bit where bound is None.

    Raises:
        AssertionError: names what differs and by how much.
    """
    assert got["parameters"].keys() == want["parameters"].keys()
    pairs = [("losses", torch.tensor(got["losses"]), torch.tensor(want["losses"]))]
    pairs += [(k, value, want["parameters"][k]) for k, value in got["parameters"].items()]
    for name, a, b in pairs:
        assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        error = relative_error(a, b)
        same = torch.equal(a, b) if bound is None else error <= bound
        assert same, f"{name} differs: relative error {error:.2e}, allowed {bound or 'none'}"


@functools.cache
def _forks() -> subprocess.Popen[str]:
    """The process that training runs are forked from; it ends when this one does."""
    quiet = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.megatron.common.forks"],
        cwd=ROOT,
        env={**os.environ, **quiet},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    for line in server.stdout:
        if line == "ready\n":
            return server
    raise AssertionError("the process for training runs did not start")


def forked_run(
    processes: int,
    *command: str,
    runner: bool = True,
    seconds: float = 120,
    **environment: str,
) -> tuple[int, str]:
    """Run a training script on the CPU as torchrun would, without its start and its imports.

    Args:
        processes: how many.
        command: the script and its flags.
        runner: through `megatron_mhc.run --cpu`; else the script alone, inside the stand-in.
        seconds: after which it is killed.

    Returns:
        The exit status (-9: killed) and all that was printed.
    """
    server = _forks()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.NamedTemporaryFile() as log:
        job = {
            "processes": processes,
            "command": command,
            "runner": runner,
            "seconds": seconds,
            "environment": environment,
            "log": log.name,
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return status, Path(log.name).read_text()
