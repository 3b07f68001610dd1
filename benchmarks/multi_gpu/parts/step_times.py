"""Step times of larger models, all variants of a layout in one launch."""

import json
import shutil
from pathlib import Path

from benchmarks.common.spans import exposed
from benchmarks.multi_gpu.launches import Bench, Run
from benchmarks.multi_gpu.models import (
    ATTENTION_GRAPHS,
    LARGE,
    OVERLAP,
    PAPER_EXPERTS,
    ROUTER_GRAPHS,
    TINY,
    paper_size,
)

SCALES = (1, 2, 4, 8)
"""Data parallel ranks, each with the same work: what mHC adds to a step as they grow."""
LAYOUTS = (
    *("dense-pp", "paper-pp-ep", "paper-vpp-ep", "paper-pp-ep-graphs", "paper-ep"),
    *("paper-pp4-ep", "dense-tp-pp4"),
    *(f"weak-{ranks}" for ranks in SCALES),
)
"""What `--only` names."""
TIMED = {
    "ordinary": "",
    "mhc": "--mhc",
    "overlap": OVERLAP,
    "overlap-2": f"{OVERLAP} --mhc-overlap-in-flight 2",
    "recompute": "--mhc --mhc-recompute auto",
    "overlap-recompute": f"{OVERLAP} --mhc-recompute auto",
}
EP_OVERLAP = "--overlap-moe-expert-parallel-comm"
TIMED_EXPERTS = {
    "ordinary": "",
    "mhc": "--mhc",
    "ordinary-ep-overlap": EP_OVERLAP,
    "ep-overlap": f"--mhc {EP_OVERLAP}",
}
TIMED_GRAPHS = {
    "ordinary": "",
    "mhc": "--mhc",
    "ordinary-graphs": ROUTER_GRAPHS,
    "graphs": f"--mhc {ROUTER_GRAPHS}",
    "ordinary-attn": ATTENTION_GRAPHS,
    "attn": f"--mhc {ATTENTION_GRAPHS}",
}
VARIANTS = tuple(dict.fromkeys([*TIMED, *TIMED_EXPERTS, *TIMED_GRAPHS]))
"""What `--variants` names."""
TRACED = ("dense-pp", "paper-ep")
"""Layouts that a profiler watches in a round of their own, unless `--trace` says which."""


def layouts(bench: Bench, gpus: int) -> dict[str, tuple[int, str, dict[str, str]]]:
    """Ranks, flags and variants of each layout, those that need more GPUs too."""
    dense = f"{TINY if bench.cpu else LARGE} --log-memory-interval 5"
    paper = paper_size(bench) + ("" if bench.cpu else PAPER_EXPERTS) + " --log-memory-interval 5"
    two, four = (f"--pipeline-model-parallel-size {stages}" for stages in (2, 4))
    experts = f"{paper} {two} --expert-model-parallel-size {gpus // 2}"
    plain = {name: TIMED[name] for name in ("ordinary", "mhc")}
    found = {
        "dense-pp": (gpus, f"{dense} --pipeline-model-parallel-size {min(gpus, 4)}", TIMED),
        "paper-pp-ep": (gpus, experts, TIMED),
        "paper-vpp-ep": (
            gpus,
            f"{experts} --num-layers-per-virtual-pipeline-stage 2",
            TIMED_EXPERTS,
        ),
        # a microbatch has graphs of its own: few of them
        "paper-pp-ep-graphs": (
            gpus,
            f"{experts} --te-rng-tracker --global-batch-size {2 * gpus}",
            TIMED_GRAPHS,
        ),
        "paper-ep": (
            gpus,
            f"{paper} --expert-model-parallel-size {gpus}",
            TIMED_EXPERTS | {"recompute": TIMED["recompute"]},
        ),
        "paper-pp4-ep": (8, f"{paper} {four} --expert-model-parallel-size 2", TIMED),
        "dense-tp-pp4": (
            8,
            f"{dense} {four} --tensor-model-parallel-size 2 --sequence-parallel",
            TIMED,
        ),
    }
    shared = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    for ranks in SCALES:
        flags = f"{dense} {shared} --global-batch-size {4 * ranks}"
        found[f"weak-{ranks}"] = ranks, flags, plain
    return found


def step_times(bench: Bench, gpus: int) -> None:
    """Steps of larger models: ordinary, mHC in stock order, with overlap, with recompute."""
    for name, (ranks, flags, variants) in layouts(bench, gpus).items():
        if bench.options.only and name not in bench.options.only:
            continue
        if ranks > gpus:
            if bench.options.only:
                bench.runs[name] = Run(name, ranks, failure=f"not run: it needs {ranks} GPUs")
            continue
        if bench.cpu and name.endswith("graphs"):
            continue  # there is nothing to capture
        if wanted := bench.options.variants:
            variants = {key: own for key, own in variants.items() if key in wanted}
        if not variants:
            if bench.options.only:
                bench.runs[name] = Run(name, ranks, failure="not run: none of these variants")
            continue
        traces = bench.out / "traces" / name
        shutil.rmtree(traces, ignore_errors=True)  # an earlier call's
        bench.rounds(
            name, ranks, flags, variants,
            number=bench.options.rounds, iterations=5 if bench.cpu else 9,
            trace=name in bench.options.trace,
            # what runs use that want speed; the comparisons of digits go without
            NVTE_ALLOW_NONDETERMINISTIC_ALGO="1",
            # Megatron wants one queue for tensor parallelism
            **({"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if "tensor" in flags else {}),
        )  # fmt: skip
        for variant in variants:
            if row := bench.runs.get(f"{name}: {variant}"):  # none where the call's time is up
                said = (row.remark, messages(traces / variant))
                row.remark = "; ".join(filter(None, said))


def messages(folder: Path) -> str:
    """What the traces of all ranks say of a variant's messages; empty without traces."""
    ranks = sorted(folder.rglob("*.json*"))
    if not ranks:
        return ""
    try:
        alone = [exposed(trace) for trace in ranks]
    except (EOFError, json.JSONDecodeError):  # an empty one
        return "its traces are cut short"
    return ", ".join(f"{key} {'/'.join(f'{rank[key]:.0f}' for rank in alone)}" for key in alone[0])
