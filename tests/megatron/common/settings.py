"""Settings of scenarios that several tests share, and the bounds that go with them."""

from typing import Any

SGD = {"optimizer": "sgd", "lr": 0.5, "min_lr": 0.5, "sgd_momentum": 0.0}
"""Updates proportional to gradients: Adam would turn a rounding of a tiny one into a whole step."""

UNCLIPPED = {"clip_grad": 0.0}
"""No gradient norm, whose sum has another order where the parameters are sharded."""

SUMMATION_ORDER = 1e-5
"""Two ranks add partial products in another order: fp32's 6e-8, through 4 layers and 3 steps."""

FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
HEAD = {"convention": "deepseek_v4"}
DELAYED = {"convention": "deepseek_v4_1"}
"""A site reads with the H_pre of the one before, which travels with the streams."""


def layout(stages: str) -> dict[str, Any]:
    """Megatron's `--pipeline-model-parallel-layout`: E the embedding, t a layer, L the loss."""
    return {"pipeline_model_parallel_layout": stages}


def stages(size: int, **more: int) -> dict[str, Any]:
    """Arguments of initialize_model_parallel for so many stages."""
    return {"pipeline_model_parallel_size": size, **more}


VIRTUAL = stages(2, virtual_pipeline_model_parallel_size=2)
