"""Pipelines: losses against one GPU's, and the orders of a step against each other."""

import re
from functools import partial

from benchmarks.multi_gpu.launches import Bench, Part
from benchmarks.multi_gpu.models import OVERLAP, starting


def bare_ends(chunks: int, size: str) -> str:
    """Flags for so many chunks of which the first is the embedding alone and the last the loss,
    with two chunks the first alone; where the size has few layers, some in between are bare too."""
    layers = int(re.findall(r"--num-layers (\d+)", size)[-1])
    middle = max(chunks - 2, 1)
    each = ["t" * (layers * (k + 1) // middle - layers * k // middle) for k in range(middle)]
    ends = ["E", *each, "L"] if chunks > 2 else ["E", f"{each[0]}L"]
    return f"--pipeline-model-parallel-layout {'|'.join(ends)}"


def pipelines(bench: Bench, gpus: int, size: str) -> Part:
    """Losses of a pipeline against one GPU, and of the orders against each other."""
    size = starting(bench, "dense", f"{size} --mhc")
    stages = f"--pipeline-model-parallel-size {min(gpus, 4)}"
    steps = 5 if bench.cpu else bench.options.steps
    virtual = f"{stages} --num-layers-per-virtual-pipeline-stage 1"
    few = min(steps, 20)
    bare = f"{stages} {bare_ends(min(gpus, 4), size)}"
    bare_virtual = f"{stages} {bare_ends(2 * min(gpus, 4), size)}"
    timers = "--timing-log-level 2"  # the host waits for the device at every message
    runs = {
        "pp": (f"{stages} --mhc", steps),
        "pp-overlap": (f"{stages} {OVERLAP}", steps),
        "pp-overlap-2": (f"{stages} {OVERLAP} --mhc-overlap-in-flight 2", steps),
        "vpp": (f"{virtual} --mhc", steps),
        "vpp-overlap": (f"{virtual} {OVERLAP}", steps),
        "vpp-sharded": (f"{virtual} --mhc --use-distributed-optimizer", few),
        "bare": (f"{bare} --mhc", few),
        "bare-overlap": (f"{bare} {OVERLAP}", few),
        "bare-overlap-2": (f"{bare} {OVERLAP} --mhc-overlap-in-flight 2", few),
        "vbare": (f"{bare_virtual} --mhc", few),
        "vbare-overlap": (f"{bare_virtual} {OVERLAP}", few),
        "pp-timers": (f"{stages} {OVERLAP} {timers}", few),
        "vpp-timers": (f"{virtual} {OVERLAP} {timers}", few),
        "pp-late": (f"{stages} {OVERLAP}", few),
        "vpp-late": (f"{virtual} {OVERLAP}", few),
    }
    # all streams of a GPU in one queue, as tensor parallelism wants it there
    queue = {"pp-queue": "pp-overlap", "pp-queue-2": "pp-overlap-2", "vpp-queue": "vpp-overlap"}
    runs |= {name: (runs[like][0], few) for name, like in queue.items()}
    if bench.cpu:  # nothing sleeps there
        del runs["pp-late"], runs["vpp-late"]
    launches = [
        partial(bench.train, "one", 1, size, steps),
        partial(bench.train, "one-again", 1, size, few, first=1),
    ]
    for name, (flags, count) in runs.items():
        more = {"script": "benchmarks/multi_gpu/late_ends.py"} if name.endswith("late") else {}
        if name in queue:
            more["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        launches.append(partial(bench.train, name, gpus, f"{size} {flags}", count, **more))
    checks = [
        partial(bench.alike, "one-again", "one", None),
        *(partial(bench.alike, name, "one", 1e-2) for name in ("pp", "vpp", "bare", "vbare")),
        *(
            partial(bench.alike, name, name.split("-")[0], 1e-2 if "sharded" in name else None)
            for name in runs
            if "-" in name
        ),
    ]
    return launches, checks


def pipelines_beside(bench: Bench, gpus: int, size: str) -> Part:
    """Pipelines beside data and tensor parallelism, and of stages with unequal layers."""
    if gpus < 4:
        return [], []
    size = starting(bench, "dense", f"{size} --mhc")
    steps = 5 if bench.cpu else bench.options.steps
    two = "--pipeline-model-parallel-size 2"
    three = (
        "--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 3"
        " --decoder-last-pipeline-num-layers 2"
    )
    tensor = f"{two} --tensor-model-parallel-size 2 --sequence-parallel"
    layouts = {"dp2-pp2": (4, two), "tp2-pp2": (4, tensor), "pp3": (3, three)}
    if gpus >= 8:
        layouts["tp2-pp4"] = 8, tensor.replace(two, "--pipeline-model-parallel-size 4")
    launches, checks = [partial(bench.train, "one-beside", 1, size, min(steps, 20))], []
    for name, (ranks, flags) in layouts.items():
        # Megatron wants one queue for tensor parallelism
        more = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if "tensor" in flags else {}
        orders = {"": "--mhc", "-overlap": OVERLAP}
        if name == "pp3":
            orders["-overlap-2"] = f"{OVERLAP} --mhc-overlap-in-flight 2"
        for order, own in orders.items():
            whole = f"{size} {flags} {own}"
            launches.append(partial(bench.train, name + order, ranks, whole, steps, **more))
            if order:
                checks.append(partial(bench.alike, name + order, name, None))
        checks.append(partial(bench.alike, "one-beside", name, 2e-2))
    return launches, checks
