"""Expert parallel ranks, tensor with sequence parallelism, context parallelism, against one GPU."""

from functools import partial

from benchmarks.multi_gpu.launches import Bench, Part
from benchmarks.multi_gpu.models import MOE, starting


def other_parallelism(bench: Bench, gpus: int, size: str) -> Part:
    """MoE over expert parallel ranks, TP with sequence parallelism, CP."""
    steps = 5 if bench.cpu else 20
    moe = starting(bench, "moe", f"{size} {MOE} --mhc")
    dense = starting(bench, "dense", f"{size} --mhc")
    one_queue = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    split = min(gpus, 4)
    tensor = f"{dense} --tensor-model-parallel-size {split} --sequence-parallel"
    launches = [
        partial(bench.train, "moe-one", 1, moe, steps),
        partial(bench.train, "dense-one", 1, dense, steps, first=1),
        partial(bench.train, "moe-ep", gpus, f"{moe} --expert-model-parallel-size {gpus}", steps),
        partial(bench.train, "tp-sp", split, tensor, steps, **one_queue),
    ]
    checks = [
        partial(bench.alike, "moe-ep", "moe-one", 2e-2),
        partial(bench.alike, "tp-sp", "dense-one", 2e-2),
    ]
    if not bench.cpu:
        for ranks in sorted({2, split}):
            for how in ("p2p", "a2a"):
                name = f"cp{ranks}-{how}"
                context = f"{dense} --context-parallel-size {ranks} --cp-comm-type {how}"
                launches.append(partial(bench.train, name, ranks, context, steps, **one_queue))
                checks.append(partial(bench.alike, name, "dense-one", 2e-2))
    return launches, checks
