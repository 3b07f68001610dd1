"""Trains what is not finished, so many at a time, within a budget of seconds."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from .runs import DONE, ROOT, Run

ITERATION = re.compile(
    r" iteration +(\d+)/ *(\d+) .*?elapsed time per iteration \(ms\): ([\d.]+)"
    r".*?global batch size: +(\d+).*?lm loss: ([\d.E+-]+|nan)"
)
"""Megatron's line: step, steps, milliseconds a step, sequences a step, loss."""


class Budget(NamedTuple):
    """When runs are stopped.

    Attributes:
        end: time.monotonic() at which all that runs is told to save and end.
        save: seconds that this may take; what still runs then is killed.
        start: seconds below which nothing is started any more.
    """

    end: float = float("inf")
    save: float = 60
    start: float = 0


class Started(NamedTuple):
    """A run's process."""

    run: Run
    slot: int
    since: float
    command: list[str]


def progress(log: Path, sequence: int | None = None) -> str:
    """How far a run is, of its log's last line on it: steps, loss, speed, seconds that are left."""
    lines = ITERATION.findall(log.read_text(errors="replace")) if log.exists() else []
    if not lines:
        return "starting"
    step, steps, milliseconds, batch, loss = lines[-1]
    speed = 1000 * int(batch) / float(milliseconds)
    said = f"{speed * sequence:,.0f} tokens/s" if sequence else f"{speed:.1f} sequences/s"
    left = (int(steps) - int(step)) * float(milliseconds) / 1000
    return f"step {step} of {steps}, loss {float(loss):.3f}, {said}, {left:.0f} s left"


def places(
    count: int, environment: Mapping[str, str], own_gpu: bool, visible: str | None
) -> list[dict[str, str]]:
    """The environments of so many runs at a time.

    Args:
        count: of runs.
        environment: what they all have.
        own_gpu: whether each has a GPU for itself.
        visible: CUDA_VISIBLE_DEVICES, from whose GPUs they take theirs; None where it is not set.

    Raises:
        ValueError: there are fewer GPUs in it.
    """
    if not own_gpu:
        return [dict(environment) for _ in range(count)]
    every = map(str, range(count)) if visible is None else visible.split(",")
    gpus = [gpu for gpu in every if gpu.strip()]
    if len(gpus) < count:
        fewer = f"give --gpus {len(gpus)}, or more devices" if gpus else "make a device visible"
        raise ValueError(
            f"--gpus {count}, but CUDA_VISIBLE_DEVICES={visible!r} names {len(gpus)}: {fewer}"
        )
    return [{**environment, "CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:count]]


class Schedule:
    """Runs, and the places where they run.

    Args:
        runs: all of them, in the order in which they are wanted.
        slots: an environment for each run that may run at a time: CUDA_VISIBLE_DEVICES, say.
        budget: when to stop.
        closed: called with each run whose process has ended.
        report: seconds between lines of progress; 0: none.
        sequence: tokens of a sequence, for the speed.
    """

    def __init__(
        self,
        runs: list[Run],
        slots: list[dict[str, str]],
        budget: Budget,
        closed: Callable[[Run], None] = lambda run: None,
        report: float = 0,
        sequence: int | None = None,
    ) -> None:
        self.runs, self.slots, self.budget, self.closed = runs, slots, budget, closed
        self.report, self.sequence = report, sequence
        self.waiting = [run for run in runs if run.state not in DONE]
        self.running: dict[subprocess.Popen[bytes], Started] = {}
        self.stopped, self.good = False, True

    def train(self) -> bool:
        """Train until all is done or the budget is spent; whether no run failed."""
        reported = time.monotonic()
        try:
            while self.running or (self.waiting and not self.stopped):
                self._start()
                time.sleep(0.2)
                self._stop_in_time()
                for process in [p for p in self.running if p.poll() is not None]:
                    self._close(process)
                if self.report and time.monotonic() - reported > self.report:
                    reported = time.monotonic()
                    for one in self.running.values():
                        self._say(one.run, progress(one.run.log, self.sequence))
        finally:
            for process in self.running:
                process.kill()
        left = [run for run in self.runs if run.state not in DONE]
        done = len(self.runs) - len(left)
        print(f"stability: {done} of {len(self.runs)} runs are done", flush=True)
        return self.good

    def _say(self, run: Run, text: str) -> None:
        print(f"stability: {run.folder.name}: {text}", flush=True)

    def _start(self) -> None:
        """Fill the free slots, while there is time for a start."""
        if time.monotonic() > self.budget.end - self.budget.start:
            self.waiting = []
        busy = {one.slot for one in self.running.values()}
        for slot in (slot for slot in range(len(self.slots)) if slot not in busy):
            if not self.waiting or self.stopped:
                return
            run = self.waiting.pop(0)
            run.folder.mkdir(parents=True, exist_ok=True)
            command, environment = run.command(), {**os.environ, **self.slots[slot]}
            with run.log.open("wb") as log:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            self.running[process] = Started(run, slot, time.monotonic(), command)

    def _stop_in_time(self) -> None:
        now = time.monotonic()
        if not self.stopped and now > self.budget.end:
            self.stopped = True
            for process in self.running:
                process.terminate()
        if self.stopped and now > self.budget.end + self.budget.save:
            for process in self.running:
                process.kill()

    def _close(self, process: "subprocess.Popen[bytes]") -> None:
        run, _, since, command = self.running.pop(process)
        seconds = time.monotonic() - since
        state = run.close(process.returncode, self.stopped, seconds, command)
        self._say(run, f"{state} in {seconds:.0f} s")
        if state == "failed":
            self.good = False
            lines = run.log.read_text(errors="replace").splitlines()
            print("\n".join([f"{run.log}:", *lines[-15:]]), file=sys.stderr, flush=True)
        self.closed(run)
