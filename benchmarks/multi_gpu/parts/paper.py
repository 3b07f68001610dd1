"""The paper's layers (MLA, mixture of experts, distributed optimizer with both overlaps)."""

from functools import partial

from benchmarks.multi_gpu.launches import Bench, Part
from benchmarks.multi_gpu.models import OVERLAP, paper_size

LAYOUTS = {"paper-ep": (1, 4), "paper-pp4": (4, 2), "paper-wide": (2, 4)}
"""Stages, and ranks that share the experts; the last two are of eight GPUs."""
ORDERS = {"": "--mhc", "-recompute": "--mhc --mhc-recompute auto", "-overlap": OVERLAP}


def paper(bench: Bench, gpus: int, _: str) -> Part:
    """The paper's layers: what changes nothing but the order of work changes no digit."""
    layouts = {"paper": (min(gpus, 2), 2 if gpus >= 4 else 1), **LAYOUTS}
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
    if gpus >= 8:
        node = ("paper-pp4", "paper-wide")
        runs |= {layout + order: flags for layout in node for order, flags in ORDERS.items()}
    steps = 5 if bench.cpu else min(bench.options.steps, 20)
    free = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"}
    if gpus >= 4:
        runs |= {"paper-ep": "--mhc", "paper-ep-recompute": "--mhc --mhc-recompute auto"}
    launches = [
        partial(
            bench.train, name, gpus,
            f"{paper_size(bench)} {parallel(*layouts[base(name)])} {flags}", steps,
            **(free if "free" in name else {}),
        )
        for name, flags in runs.items()
    ]  # fmt: skip
    exact = [
        name for name in runs if "free" not in name and name not in (*layouts, "paper-ordinary")
    ]
    checks = [partial(bench.alike, name, base(name), None) for name in exact]
    # another layout adds up in another order; an untrained router at full rate makes that large:
    # runs of other orders were 1.2e-3 apart after five steps, up to 7 % after twenty
    checks += [partial(bench.alike, name, "paper", 1e-2, 5) for name in LAYOUTS if name in runs]
    # ten times apart is no bound: these lines are there for their distance
    checks += [partial(bench.alike, name, "paper", 10) for name in runs if "free" in name]
    return launches, checks


def parallel(stages: int, experts: int) -> str:
    """The flags of a layout."""
    return f"--pipeline-model-parallel-size {stages} --expert-model-parallel-size {experts}"


def base(name: str) -> str:
    """The run whose digits this one has to have: in stock order, in the same layout."""
    layout = "-".join(name.split("-")[:2])
    return layout if layout in LAYOUTS else "paper"
