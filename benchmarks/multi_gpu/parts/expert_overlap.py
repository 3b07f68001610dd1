"""`--overlap-moe-expert-parallel-comm` with mHC, all GPUs as expert parallel ranks.

Its nodes cut a layer: fewer sites are fused than in stock order, so losses are near those in stock
order, and the very digits of stock order with the same sites fused (`cut_layers.py`). Each run of
the overlap is also compared with itself, digit for digit: again, which a stream that does not wait
for another would change from run to run, and with PyTorch's memory cache turned off, where memory
that is read after it was given back holds something else.
"""

from functools import partial

from benchmarks.multi_gpu.launches import Bench, Part
from benchmarks.multi_gpu.models import CUT, paper_size

EP_OVERLAP = "--mhc --overlap-moe-expert-parallel-comm"
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def expert_overlap(bench: Bench, gpus: int, _: str) -> Part:
    """The paper's layers, with and without the overlap."""
    size = f"{paper_size(bench)} --expert-model-parallel-size {gpus}"
    steps = 5 if bench.cpu else min(bench.options.steps, 50)
    few = min(steps, 20)
    runs: dict[str, tuple[str, int, dict[str, str]]] = {
        "ep": ("--mhc", steps, {}),
        "ep-cut": ("--mhc", steps, {"script": CUT}),
        "ep-overlap": (EP_OVERLAP, steps, {}),
        "ep-overlap-again": (EP_OVERLAP, steps, {}),
        "ep-overlap-uncached": (EP_OVERLAP, steps, NO_CACHE),
    }
    if not bench.cpu:  # Transformer Engine's linears alone have their weights' gradients apart
        runs["ep-overlap-wgrad"] = (f"{EP_OVERLAP} --delay-wgrad-compute", few, {})
    launches = [
        partial(bench.train, name, gpus, f"{size} {flags}", count, **more)
        for name, (flags, count, more) in runs.items()
    ]
    exact = [name for name in runs if name.startswith("ep-overlap-")]
    checks = [partial(bench.alike, name, "ep-overlap", None) for name in exact]
    # last: a run that differs is nothing to compare others with. Later steps of an untrained router
    # are as far apart (2e-2) where attention's backward alone adds in another order.
    checks.append(partial(bench.alike, "ep-cut", "ep", 5e-3, first=5))
    checks.append(partial(bench.alike, "ep-overlap", "ep-cut", None))
    return launches, checks
