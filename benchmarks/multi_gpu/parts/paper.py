"""The paper's layers (MLA, mixture of experts, distributed optimizer with both overlaps)."""

from functools import partial

from benchmarks.multi_gpu.launches import Bench, Part
from benchmarks.multi_gpu.models import OVERLAP, paper_size


def paper(bench: Bench, gpus: int, _: str) -> Part:
    """The paper's layers: what changes nothing but the order of work changes no digit."""
    size = paper_size(bench)
    if gpus >= 2:
        size += " --pipeline-model-parallel-size 2"
    if gpus >= 4:
        size += " --expert-model-parallel-size 2"
    experts = size.replace("--pipeline-model-parallel-size 2", "").replace(
        "--expert-model-parallel-size 2", "--expert-model-parallel-size 4"
    )
    runs = {
        "paper-ordinary": "",
        "paper": "--mhc",
        "paper-again": "--mhc",
        "paper-recompute": "--mhc --mhc-recompute auto",
        "paper-recompute-1": "--mhc --mhc-recompute 1",
        # attention's backward adds in any order: what that alone does to the losses
        "paper-free": "--mhc",
        "paper-free-again": "--mhc",
        "paper-free-recompute": "--mhc --mhc-recompute auto",
    }
    if gpus >= 2:
        runs |= {
            "paper-overlap": OVERLAP,
            "paper-overlap-recompute": f"{OVERLAP} --mhc-recompute auto",
        }
    steps = 5 if bench.cpu else min(bench.options.steps, 20)
    free = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"}
    if gpus >= 4:
        runs |= {"paper-ep": "--mhc", "paper-ep-recompute": "--mhc --mhc-recompute auto"}
    launches = [
        partial(
            bench.train, name, gpus,
            f"{experts if 'ep' in name.split('-') else size} {flags}", steps,
            **(free if "free" in name else {}),
        )
        for name, flags in runs.items()
    ]  # fmt: skip
    exact = [
        name
        for name in runs
        if "free" not in name and name not in ("paper", "paper-ordinary", "paper-ep")
    ]
    checks = [
        partial(bench.alike, name, "paper-ep" if "-ep-" in name else "paper", None)
        for name in exact
    ]
    # ten times apart is no bound: these lines are there for their distance
    checks += [partial(bench.alike, name, "paper", 10) for name in runs if "free" in name]
    return launches, checks
