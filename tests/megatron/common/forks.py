"""Training runs as forks of one process that has imported Megatron, so that each starts at once.

python -m tests.megatron.common.forks reads a run a line (JSON) and answers with its exit status
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from typing import Any

from megatron_mhc import run
from megatron_mhc.patches import cpu

cpu.enter()

# what every run would import, before any patch of ours
import megatron.training  # noqa: E402
import megatron.training.argument_utils  # noqa: E402
import megatron.training.arguments  # noqa: E402, F401

from megatron_mhc import spec  # noqa: E402, F401


def _become(job: dict[str, Any], rank: int, port: int) -> None:
    """Turn a fork into one process of a run, and run it to the end of this process."""
    os.environ.update(
        job["environment"],
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job["processes"]),
        LOCAL_WORLD_SIZE=str(job["processes"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.setsid()  # a group of its own, by which `_end` finds what it leaves
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["runner"]:
        run.main(["--cpu", *job["command"]])
    else:
        sys.argv = job["command"]
        runpy.run_path(job["command"][0], run_name="__main__")


def _end(process: int) -> None:
    """Kill a process of a run, or what it has left: a killed one leaves its writers behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def _wait(processes: list[int], seconds: float) -> int:
    """The first exit status that is not 0 (the others are killed then), or 0."""
    status, running, end = 0, set(processes), time.monotonic() + seconds
    while running and not status:
        for process in processes:
            if process in running:
                ended, code = os.waitpid(process, os.WNOHANG)
                if ended:
                    running.remove(process)
                    status = status or os.waitstatus_to_exitcode(code)
        if time.monotonic() > end:
            status = status or -signal.SIGALRM
        time.sleep(0.02)
    for process in processes:
        _end(process)
    for process in running:
        os.waitpid(process, 0)
    return status


def main() -> None:
    """Serve until standard input ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as held:
            # bound until the run ends, so that nobody else is given the port before rank 0 listens
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("127.0.0.1", 0))
            processes: list[int] = []
            for rank in range(job["processes"]):
                process = os.fork()
                if not process:
                    _become(job, rank, held.getsockname()[1])
                    return
                processes.append(process)
            print(_wait(processes, job["seconds"]), flush=True)


if __name__ == "__main__":
    main()
