"""Megatron's inference over pipeline stages, which exchange one stream there: refused."""

from typing import Any

from .layer import MHCLayer


def refuse_stages(layer: MHCLayer) -> None:
    """Raise a ValueError where the layer's model has several pipeline stages."""
    if layer.config.pipeline_model_parallel_size > 1:
        raise ValueError(
            "Megatron's inference sends one stream between pipeline stages, and mHC has"
            f" {layer.mhc.num_streams}: load the checkpoint with"
            " --pipeline-model-parallel-size 1"
        )


def check_model(model: Any) -> None:
    """The same of a model that an inference engine is given; an ordinary one may have stages.

    Raises:
        ValueError: it has mHC and several stages. Every stage says so, before it waits for another.
    """
    for module in model.modules():
        if isinstance(module, MHCLayer):
            refuse_stages(module)
