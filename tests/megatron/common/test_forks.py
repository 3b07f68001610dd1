"""Forks begin and end as what Python starts; none outlives who asked for it."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.megatron.common.fork_client import Fork
from tests.megatron.common.launch import (
    TIMED_OUT,
    _forks,
    cold_python,
    forked,
    forked_python,
    forking_python,
    quiet,
)

PROGRAMS = {
    "prints": "import sys; print(sys.argv, __name__)",
    "raises": "raise ValueError('no')",
    "exits": "raise SystemExit(3)",
    "exits with a sentence": "import sys; sys.exit('a sentence')",
    "is killed": f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})",
    "says good-bye": "import atexit; atexit.register(print, 'bye'); print('hello')",
    "ends with its threads": (
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()"
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fork_ends_as_python_does(name: str) -> None:
    command = ("-c", PROGRAMS[name], "--flag", "word")
    fork, real = forked_python(*command, stage="torch"), cold_python(*command)
    assert fork.returncode == real.returncode
    assert fork.stdout.splitlines()[-1:] == real.stdout.splitlines()[-1:]


def gone(process: int) -> bool:
    """Whether a process has ended, within some seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


SLOW = """
import os, subprocess, sys
child = subprocess.Popen(["sleep", "1000"])
print(os.getpid(), child.pid, flush=True)
child.wait()
"""


def test_a_time_out_ends_a_run_and_what_it_has_started() -> None:
    status, printed = forked(2, "-c", SLOW, stage="torch", seconds=2)
    assert status == TIMED_OUT
    processes = [int(number) for number in printed.split()]
    assert len(processes) == 4 and all(gone(process) for process in processes)


def test_a_rank_that_fails_ends_the_others() -> None:
    program = f"import os\nif os.environ['RANK'] == '1': raise ValueError('rank 1')\n{SLOW}"
    began = time.monotonic()
    status, printed = forked(2, "-c", program, stage="torch", seconds=60)
    assert status == 1 and "ValueError: rank 1" in printed
    assert time.monotonic() - began < 30


def test_one_that_is_killed_as_it_ends_ends_no_other() -> None:
    """Who forks hears of both at once."""
    server, folder = _forks()
    (stdin, ours), (printed, stdout) = os.pipe(), os.pipe()
    program = ["-c", "import os; print(os.getpid(), flush=True); input()"]
    fork = Fork(folder, "torch", program, quiet(), os.getcwd(), (stdin, stdout, stdout))
    os.close(stdin)
    os.close(stdout)
    process = int(os.read(printed, 20))
    os.kill(server.pid, signal.SIGSTOP)
    os.close(ours)
    assert gone(process)
    fork.kill()
    os.kill(server.pid, signal.SIGCONT)
    assert fork.wait() == 1
    os.close(printed)
    assert forked_python("-c", "print('the next')", stage="torch").stdout == "the next\n"


def test_a_script_gets_a_python_that_forks(tmp_path: Path) -> None:
    """It is the script's own process to all that the script can tell."""
    program = "import os, sys; print(os.getcwd(), os.environ['WORD'], input()); sys.exit(7)"
    done = subprocess.run(
        [forking_python(), "-c", program],
        cwd=tmp_path,
        env=quiet(WORD="given"),
        input="read",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (7, f"{tmp_path} given read\n")


def test_a_script_that_is_killed_takes_its_fork_along() -> None:
    command = [forking_python(), "-c", SLOW]
    with subprocess.Popen(command, env=quiet(), stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        processes = [int(number) for number in script.stdout.readline().split()]
        os.kill(script.pid, signal.SIGKILL)
        assert len(processes) == 2 and all(gone(process) for process in processes)


SPAWNS = """
import multiprocessing

def work(queue, word):
    queue.put(word + "!")
    raise SystemExit(5)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        queue = manager.Queue()
        process = context.Process(target=work, args=(queue, "spawned"))
        process.start()
        print(queue.get())
        process.join()
        print(process.exitcode)
"""


def test_what_a_fork_spawns_works(tmp_path: Path) -> None:
    """As Megatron's writers of checkpoints do."""
    script = tmp_path / "spawns.py"
    script.write_text(SPAWNS)
    assert forked_python(str(script), stage="torch").stdout.split() == ["spawned!", "5"]
