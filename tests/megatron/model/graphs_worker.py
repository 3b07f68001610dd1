"""One process of the tests of CUDA graphs: what Megatron captures of each layer, run without one.

python -m tests.megatron.model.graphs_worker SCENARIOS_AS_JSON RESULT_FILE
"""

from typing import Any

import torch

from tests.megatron.common import models, train, worker  # isort: skip  (first: it readies Megatron for the CPU)

from megatron.core import parallel_state
from megatron.core.transformer import cuda_graphs

from tests.megatron.common.scenario import SEQUENCE, Scenario


def run(s: Scenario) -> list[dict[str, Any]]:
    """For each layer, through Megatron's own helper of Transformer Engine's graphs:

    Returns:
        given, made (shapes of the sample input and of the first output), learns (whether the sample
        input has a gradient), called and hooked (modules with parameters that ran in what is
        captured, and those whose parameters Megatron gathers in front of a replay).
    """
    parallel_state.initialize_model_parallel()
    config = train.config_of(s)
    model = train.wrapped(s, config, models.build(s, config))
    cuda_graphs.HAVE_TE_GRAPHS = True  # the helper asks, and uses none of it before it captures
    helper = cuda_graphs.TECudaGraphHelper(model, config, SEQUENCE, s.batch)
    helper.num_microbatches = 1
    positional, named = helper._get_sample_arguments([1, -1])
    helper.cuda_graph_set_manual_hooks()
    samples = zip(helper.flattened_callables, positional, named, strict=True)
    cuda_graphs._set_capture_start()
    try:
        result = [captured(layer, *sample) for layer, *sample in samples]
    finally:
        cuda_graphs._set_capture_end()
    parallel_state.destroy_model_parallel()
    return result


def captured(layer: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """What `run` returns for one layer."""
    names = {
        module: name
        for name, module in layer.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, _: called.add(names[module]))
        for module in names
    ]
    streams = positional[0]
    with torch.enable_grad():
        made = layer._te_cuda_graph_capture(*positional, **named)
    for handle in handles:
        handle.remove()
    return {
        "given": tuple(streams.shape),
        "made": tuple(made[0].shape),
        "learns": streams.requires_grad and streams.is_leaf,
        "called": called,
        "hooked": {names[module] for _, (module,) in layer.cuda_graph_manual_hooks},
    }


if __name__ == "__main__":
    worker.work(lambda settings: {"layers": run(Scenario(**settings))})
