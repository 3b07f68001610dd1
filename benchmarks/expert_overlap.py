"""`--overlap-moe-expert-parallel-comm` with mHC on several GPUs, a part of `multi_gpu.py`.

Its nodes add up a residual's gradients in another order than whole layers, so losses are near those
in stock order, not the same. Each run of the overlap is compared with itself, digit for digit:
again, and with PyTorch's memory cache turned off, where memory that is read after it was given back
would hold something else.
"""

from functools import partial
from typing import Any

EP_OVERLAP = "--mhc --overlap-moe-expert-parallel-comm"
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def expert_overlap(bench: Any, gpus: int, paper: str) -> tuple[list[Any], list[Any]]:
    """Launches and checks, all GPUs as expert parallel ranks.

    Args:
        bench: `launches.Bench`.
        gpus: how many.
        paper: flags of the paper's layers.
    """
    size = f"{paper} --expert-model-parallel-size {gpus}" + " --bf16" * bench.cpu
    steps = 5 if bench.cpu else min(bench.options.steps, 50)
    few = min(steps, 20)
    runs: dict[str, tuple[str, int, dict[str, str]]] = {
        "ep": ("--mhc", steps, {}),
        "ep-overlap": (EP_OVERLAP, steps, {}),
        "ep-overlap-again": (EP_OVERLAP, steps, {}),
        "ep-overlap-uncached": (EP_OVERLAP, few, NO_CACHE),
    }
    if not bench.cpu:  # Transformer Engine's linears alone have their weights' gradients apart
        runs["ep-overlap-wgrad"] = (f"{EP_OVERLAP} --delay-wgrad-compute", few, {})
    launches = [
        partial(bench.train, name, gpus, f"{size} {flags}", count, **more)
        for name, (flags, count, more) in runs.items()
    ]
    checks = [
        partial(bench.alike, "ep-overlap", "ep", 2e-2),
        partial(bench.alike, "ep-overlap-again", "ep-overlap", None),
        partial(bench.alike, "ep-overlap-uncached", "ep-overlap", None),
    ]
    if "ep-overlap-wgrad" in runs:
        checks.append(partial(bench.alike, "ep-overlap-wgrad", "ep", 2e-2))
    return launches, checks
