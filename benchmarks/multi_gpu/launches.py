"""Launches of Megatron on several GPUs: each with a time limit, its log read when it has ended."""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import pretrain

RUNNER = "megatron_mhc.run"
COMMON = f"""
    {pretrain.FLAGS}
    --lr 1e-4 --lr-decay-style constant --clip-grad 0 --ckpt-format torch_dist
"""
GPU = "--bf16 --transformer-impl transformer_engine"
CPU = """
    --transformer-impl local --distributed-backend gloo --disable-jit-fuser
    --no-masked-softmax-fusion --no-persist-layer-norm --no-bias-swiglu-fusion
    --no-bias-dropout-fusion --no-rope-fusion
"""
WARM_UP = 3
"""Steps that are not timed."""
Part = tuple[Sequence[Callable[[], Any]], Sequence[Callable[[], Any]]]
"""Launches, which may run side by side, and checks of what came of them."""


def apart(loss: str, other: str) -> float:
    """How far a printed loss is from another, relatively; infinitely, if one is no number."""
    distance = abs(float(loss) / float(other) - 1)
    return distance if math.isfinite(distance) else math.inf


@dataclass
class Run:
    """A launch and what came of it."""

    name: str
    gpus: int
    seconds: float = 0.0
    failure: str = ""
    losses: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    step_ms: float = 0.0
    peak_gib: float = 0.0
    remark: str = ""

    def read(self, text: str) -> None:
        """Take the figures that Megatron printed."""
        self.losses, self.norms = pretrain.losses(text), pretrain.norms(text)
        times = pretrain.step_times(text)
        self.step_ms = statistics.median(times[WARM_UP:]) if len(times) > WARM_UP else 0.0
        self.peak_gib = pretrain.peak_gib(text)


class Bench:
    """Launches runs, one after the other or side by side, and keeps what came of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cpu: bool = options.cpu
        self.out: Path = options.out.resolve()
        self.begin = time.time()
        self.runs: dict[str, Run] = {}
        self.reserved = 0.0

    def left(self) -> float:
        """Seconds of the whole call's limit that are left, but for those reserved for later."""
        return self.options.limit - self.reserved - (time.time() - self.begin)

    def side_by_side(self, launches: list[Callable[[], Any]]) -> None:
        """Run these, `--jobs` at a time; one that raises is a failure in the table."""
        with ThreadPoolExecutor(self.options.jobs) as pool:
            for index, result in enumerate([pool.submit(launch) for launch in launches]):
                error = result.exception()
                if error is not None:
                    self.runs[f"launch {index}"] = Run(f"launch {index}", 0, failure=repr(error))

    def start(
        self,
        name: str,
        gpus: int,
        flags: str,
        iterations: int,
        first: int = 0,
        script: str = pretrain.SCRIPT,
        **environment: str,
    ) -> tuple[Run, Any]:
        """Start a launch on GPUs first, first + 1, ..."""
        folder = self.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shared = self.options.ranks_per_gpu > 1
        runner = ["--no-python", "benchmarks/multi_gpu/shared_gpu.sh"] if shared else ["-m", RUNNER]
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(gpus), *runner),
            *(["--cpu"] if self.cpu else []),
            *script.split(),
            *COMMON.split(),
            *(CPU if self.cpu else GPU).split(),
            *flags.split(),
            *("--train-iters", str(iterations), "--tensorboard-dir", str(folder / "tensorboard")),
        ]
        cards = -(-gpus // self.options.ranks_per_gpu)
        visible = ",".join(str((0 if shared else first) + index) for index in range(cards))
        extra = {"CUDA_VISIBLE_DEVICES": "" if self.cpu else visible, **environment}
        if self.cpu:
            extra |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
        log = (folder / "log").open("w")
        print(f"== {name}: {' '.join(flags.split())}", file=log, flush=True)
        process = subprocess.Popen(
            command, cwd=pretrain.ROOT, env={**os.environ, **extra}, start_new_session=True,
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.runs[name] = Run(name, gpus)
        return self.runs[name], process

    def finish(self, run: Run, process: Any) -> Run:
        """Wait for a launch, within its limit and the whole call's, and read what it printed."""
        begin = time.time()
        limit = max(5.0, min(self.options.each, self.left()))
        try:
            code = process.wait(limit)
            run.failure = f"exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            # its ranks are sessions of their own: the launcher ends them, if it is asked politely
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            run.failure = f"more than {limit:.0f} s"
        run.seconds = time.time() - begin
        text = (self.out / run.name / "log").read_text(errors="replace")
        run.read(text)
        if run.failure:
            errors = pretrain.errors(text)
            run.remark = next((e for e in errors if not e.startswith("ChildFailed")), "")[:200]
        print(f"{run.name}: {run.seconds:.0f} s {run.failure} {run.remark}", flush=True)
        return run

    def train(
        self, name: str, gpus: int, flags: str, iterations: int, first: int = 0, **more: str
    ) -> Run | None:
        """Start and finish, unless the call's time is up."""
        if self.left() < 15:
            self.runs[name] = Run(name, gpus, failure="not run: no time left")
            return None
        return self.finish(*self.start(name, gpus, flags, iterations, first, **more))

    def rounds(
        self,
        group: str,
        gpus: int,
        flags: str,
        variants: dict[str, str],
        *,
        number: int,
        iterations: int,
        trace: bool = False,
        **environment: str,
    ) -> None:
        """Time variants of a model in one launch (`rounds.py`): a row of the table for each.

        Args:
            group: names the launch, and begins the names of the rows.
            flags: of all variants.
            variants: names and the flags that each adds; the first is what the others go by.
            number: of rounds.
            trace: add a round under the profiler.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        listed = self.out / f"{group}.json"
        listed.write_text(json.dumps(variants))
        script = f"benchmarks/multi_gpu/rounds.py --rounds {number} --variants {listed}"
        if trace:
            script += f" --trace {self.out / 'traces' / group}"
        launch = self.train(group, gpus, flags, iterations, script=script, **environment)
        if launch is None:
            return
        parts = re.split(r"== round (\S+) (\S+)\n", (self.out / group / "log").read_text())[1:]
        base = 0.0
        for name in variants:
            row = Run(f"{group}: {name}", gpus)
            texts = [
                text
                for number_, of, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
                if of == name and number_ != "traced"
            ]
            steps = []
            for text in texts:
                row.read(text)
                if row.step_ms:
                    steps.append(row.step_ms)
            if not steps:
                row.failure = "no steps" if number else ""
            else:
                row.step_ms = statistics.median(steps)
                base = base or row.step_ms
                each = ", ".join(f"{step:.1f}" for step in steps)
                row.remark = f"{row.step_ms / base:.3f} of the first; medians of rounds {each}"
            self.runs[row.name] = row

    def alike(self, one: str, other: str, bound: float | None, first: int | None = None) -> None:
        """Compare losses: with gradient norms digit for digit where bound is None, else relatively.

        The other may have gone on for longer; `first` is how many steps to look at.
        """
        if one not in self.runs or other not in self.runs:
            return  # its launch raised, which is a line of its own
        a, b = self.runs[one], self.runs[other]
        steps = min(len(a.losses), first or len(a.losses))
        if a.failure or b.failure or not steps or steps > len(b.losses):
            a.remark = a.remark or f"not comparable with {other}"
            return
        losses = b.losses[:steps]
        own = a.losses[:steps]
        if own == losses and (a.norms[:steps] == b.norms[:steps] or bound is not None):
            what = "losses and gradient norms" if bound is None else "losses"
            a.remark = f"{steps} {what} as {other}'s, digit for digit"
            return
        worst = max(map(apart, own, losses))
        a.remark = f"{steps} losses within {worst:.1e} of {other}'s"
        if bound is None or worst > bound:
            a.failure = "differs"
