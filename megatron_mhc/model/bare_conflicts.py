"""What mHC cannot work with where a pipeline stage or model chunk has no layers.

Megatron's flags say where the layers are before anything is built, and every rank has them. Without
flags the first step finds out (`pipeline.agreement`): a rank without layers builds none of ours.
"""

from typing import Any

from megatron_mhc.costs.sites import hybrid_pattern, segments_of


def kinds_of_chunks(args: Any) -> list[set[str]]:
    """What each pipeline stage, or model chunk, has: decoder, mtp, loss and more of Megatron's
    `LayerType`; no chunk where no flag places layers by hand.

    Args:
        args: Megatron's parsed arguments.
    """
    if layout := args.pipeline_model_parallel_layout:
        # only where it is needed: the runner says what is missing before Megatron is imported
        from megatron.core.transformer import pipeline_parallel_layer_layout as layouts

        placed = layouts.PipelineParallelLayerLayout.from_str(
            layout, args.pipeline_model_parallel_size
        )
        return [{kind.name for kind in chunk} for stage in placed.layout for chunk in stage]
    if pattern := hybrid_pattern(args):
        return [{"decoder"} if layers else set() for layers in segments_of(pattern)]
    return []


def refusal(settings: Any, predicts_apart: bool) -> str | None:
    """Why a model, some chunk of which has no layers, cannot be trained; None if it can.

    Args:
        settings: a TransformerConfig, or Megatron's parsed arguments.
        predicts_apart: whether multi-token prediction stands in another chunk than the loss.
    """
    if settings.overlap_moe_expert_parallel_comm:
        return (
            "--overlap-moe-expert-parallel-comm with mHC, and a pipeline stage or model chunk has"
            " no layers: its nodes neither take one stream from a message nor make one. Give every"
            " one a layer, or drop the flag"
        )
    if predicts_apart:
        return (
            "multi-token prediction with mHC stands on a pipeline stage without the loss, whose"
            " link would be of another width: put it beside the loss (m and L in one stage of"
            " --pipeline-model-parallel-layout)"
        )
    return None


def check_placement(args: Any) -> None:
    """Refuse, before anything is built, what a chunk without layers does not go with.

    Args:
        args: Megatron's parsed arguments.

    Raises:
        ValueError: says what was given, why not, and what to do.
    """
    chunks = kinds_of_chunks(args)
    if all("decoder" in kinds for kinds in chunks):
        return
    predicts_apart = any("mtp" in kinds and "loss" not in kinds for kinds in chunks)
    if said := refusal(args, predicts_apart):
        raise ValueError(said)
