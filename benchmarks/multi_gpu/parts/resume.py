"""Checkpoints of several GPUs, resumed on fewer and back."""

import shutil
from functools import partial
from pathlib import Path

from benchmarks.multi_gpu.launches import Bench, Part, apart
from benchmarks.multi_gpu.models import OVERLAP


def resume(bench: Bench, gpus: int, size: str) -> Part:
    """Save on several GPUs, go on with fewer and with one, and back; distributed optimizer."""
    size += " --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
    folder, steps = bench.out / "checkpoints", 3 if bench.cpu else 10
    shutil.rmtree(folder, ignore_errors=True)
    both = f"{size} --save {folder} --save-interval {steps} --override-opt-param-scheduler"
    stages = f"--pipeline-model-parallel-size {min(gpus, 4)} {OVERLAP}"
    two = "--pipeline-model-parallel-size 2 --mhc"
    legs = {"save": (gpus, stages), "resume-on-one": (1, "--mhc"), "back": (gpus, stages)}
    if gpus > 2:
        legs = {"save": legs["save"], "resume-on-two": (2, two), **legs}
    whole = f"{both} {stages}".replace(str(folder), f"{folder}-0")

    def one_after_the_other() -> None:
        for index, (name, (ranks, flags)) in enumerate(legs.items()):
            start = f"--load {folder}" if index else ""
            bench.train(name, ranks, f"{both} {start} {flags}", (index + 1) * steps)

    def compare() -> None:
        runs = [bench.runs[name] for name in ("whole", *legs)]
        for kept in (folder, Path(f"{folder}-0")):
            shutil.rmtree(kept, ignore_errors=True)
        if any(run.failure for run in runs):
            return
        for index, run in enumerate(runs[1:]):
            same = runs[0].losses[index * steps : (index + 1) * steps]
            if len(run.losses) != len(same):
                run.failure = f"{len(run.losses)} losses, expected {len(same)}"
                continue
            pairs = list(zip(run.losses, same, strict=True))
            if index > 0:
                # Megatron's second line after a resume is the mean of the first two losses
                del pairs[1]
            worst = max(apart(a, b) for a, b in pairs)
            run.remark = f"losses within {worst:.1e} of an uninterrupted run's"
            run.failure = "differs" if worst > 1e-2 else ""

    uninterrupted = partial(bench.train, "whole", gpus, whole, len(legs) * steps)
    return [one_after_the_other, uninterrupted], [compare]
