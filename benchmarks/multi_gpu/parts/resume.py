"""Checkpoints of several GPUs, resumed on fewer and back, and in the layout that saved."""

import shutil

from benchmarks.multi_gpu.launches import Bench, Part, apart
from benchmarks.multi_gpu.models import OVERLAP


def resume(bench: Bench, gpus: int, size: str) -> Part:
    """Save on several GPUs, go on with fewer and with one, and back; distributed optimizer."""
    size += " --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
    folder, steps = bench.out / "checkpoints", 3 if bench.cpu else 10
    whole_folder = bench.out / "checkpoints-whole"
    for old in (folder, whole_folder):
        shutil.rmtree(old, ignore_errors=True)
    size += f" --save-interval {steps} --override-opt-param-scheduler"
    stages = f"--pipeline-model-parallel-size {min(gpus, 4)} {OVERLAP}"
    two = "--pipeline-model-parallel-size 2 --mhc"
    legs = {"save": (gpus, stages), "resume-on-one": (1, "--mhc"), "back": (gpus, stages)}
    if gpus > 2:
        legs = {"save": legs["save"], "resume-on-two": (2, two), **legs}

    def one_after_the_other() -> None:
        for index, (name, (ranks, flags)) in enumerate(legs.items()):
            start = f"--load {folder}" if index else ""
            whole = f"{size} --save {folder} {start} {flags}"
            bench.train(name, ranks, whole, (index + 1) * steps)

    def uninterrupted() -> None:
        """All steps in one launch; then from its first checkpoint on, in the same layout."""
        bench.train("whole", gpus, f"{size} --save {whole_folder} {stages}", len(legs) * steps)
        again = f"{size} --load {whole_folder} --ckpt-step {steps} {stages}"
        bench.train("resume-alike", gpus, again, 2 * steps)

    def compare() -> None:
        for kept in (folder, whole_folder):
            shutil.rmtree(kept, ignore_errors=True)
        for index, name in (*enumerate(legs), (1, "resume-alike")):
            compare_leg(bench, name, index * steps, steps)

    return [one_after_the_other, uninterrupted], [compare]


def compare_leg(bench: Bench, name: str, first: int, steps: int) -> None:
    """Compare a leg of `resume` with the same steps of the run that was not interrupted.

    In that run's own layout (`save`, `resume-alike`) every digit has to agree.
    """
    run, whole = bench.runs.get(name), bench.runs.get("whole")
    if run is None or whole is None or run.failure or whole.failure:
        return  # a line of its own
    if len(run.losses) != steps:
        run.failure = f"{len(run.losses)} losses, expected {steps}"
        return
    losses = list(zip(run.losses, whole.losses[first : first + steps], strict=True))
    norms = list(zip(run.norms, whole.norms[first : first + steps], strict=True))
    if first > 0:
        # Megatron's second line after a resume is the mean of the first two losses
        del losses[1]
    if all(a == b for a, b in losses + norms):
        run.remark = "losses and gradient norms of an uninterrupted run, digit for digit"
        return
    worst, worst_norm = (max(apart(a, b) for a, b in pairs) for pairs in (losses, norms))
    run.remark = (
        f"first loss {losses[0][0]} for {losses[0][1]}, losses within {worst:.1e},"
        f" gradient norms within {worst_norm:.1e} of an uninterrupted run's"
    )
    if worst > 1e-2 or name in ("save", "resume-alike"):
        run.failure = "differs"
