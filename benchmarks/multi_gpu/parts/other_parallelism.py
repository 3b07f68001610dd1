"""Expert parallel ranks, tensor with sequence parallelism, context parallelism, against one GPU.

And Megatron-FSDP, which cannot read the weights that one GPU saved, against the distributed
optimizer on as many ranks.
"""

from functools import partial

from benchmarks.multi_gpu.launches import Bench, Part
from benchmarks.multi_gpu.models import MOE, starting

SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
FSDP = "--use-megatron-fsdp --ckpt-format fsdp_dtensor --data-parallel-sharding-strategy"


def other_parallelism(bench: Bench, gpus: int, size: str) -> Part:
    """MoE over expert parallel ranks, TP with sequence parallelism, CP, FSDP."""
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
        whole = f"{size} {SHARDED} --mhc"
        launches.append(partial(bench.train, "sharded", gpus, whole, steps))
        for held in ("optim", "optim_grads", "optim_grads_params"):
            name = f"fsdp-{held}"
            launches.append(partial(bench.train, name, gpus, f"{whole} {FSDP} {held}", steps))
            checks.append(partial(bench.alike, name, "sharded", 2e-2))
        for ranks in sorted({2, split}):
            for how in ("p2p", "a2a"):
                name = f"cp{ranks}-{how}"
                context = f"{dense} --context-parallel-size {ranks} --cp-comm-type {how}"
                launches.append(partial(bench.train, name, ranks, context, steps, **one_queue))
                checks.append(partial(bench.alike, name, "dense-one", 2e-2))
    return launches, checks
