"""CUDA graphs of layers in a pipeline with experts, its parameters gathered and reduced as it runs.

The paper's layers in two stages, four microbatches each, distributed optimizer with both overlaps.
A run with graphs is compared with one without that fuses the same sites, digit for digit; the
ordinary model's rows tell mHC's faults from Megatron's.
"""

from functools import partial

from benchmarks.multi_gpu.launches import Bench, Part
from benchmarks.multi_gpu.models import ATTENTION_GRAPHS, CUT, ROUTER_GRAPHS, paper_size

MICROBATCHES = 4
"""Of a rank. Each has graphs of its own, some GiB a stage."""


def layer_graphs(bench: Bench, gpus: int, _: str) -> Part:
    """Graphs of attention, and of attention with the router, in two stages."""
    if bench.cpu:
        return [], []  # there is nothing to capture
    size = (
        f"{paper_size(bench)} --pipeline-model-parallel-size 2"
        f" --expert-model-parallel-size {gpus // 2} --te-rng-tracker"
        f" --global-batch-size {MICROBATCHES * gpus // 2}"
    )
    recompute = "--mhc-recompute auto"
    runs: dict[str, tuple[str, dict[str, str]]] = {
        "graphs-off": ("--mhc", {}),
        "graphs-off-cut": ("--mhc", {"script": CUT}),
        "graphs-off-ordinary": ("", {}),
        "graphs-attn": (f"--mhc {ATTENTION_GRAPHS}", {}),
        "graphs-attn-recompute": (f"--mhc {recompute} {ATTENTION_GRAPHS}", {}),
        "graphs-router": (f"--mhc {ROUTER_GRAPHS}", {}),
        "graphs-router-ordinary": (ROUTER_GRAPHS, {}),
    }
    like = {
        "graphs-attn": "graphs-off",
        "graphs-attn-recompute": "graphs-off",
        "graphs-router": "graphs-off-cut",
        "graphs-router-ordinary": "graphs-off-ordinary",
    }
    steps = min(bench.options.steps, 20)
    launches = [
        partial(bench.train, name, gpus, f"{size} {flags}", steps, **more)
        for name, (flags, more) in runs.items()
    ]
    return launches, [partial(bench.alike, a, b, None) for a, b in like.items()]
