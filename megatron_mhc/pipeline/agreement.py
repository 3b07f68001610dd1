"""What is checked of a pipeline's stages before a step: that they exchange what they mean to."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_mhc.model.config_marks import is_marked
from megatron_mhc.model.layer import MHCLayer

from .state import state_of

EXCHANGED = "streams, hidden size, dtype, overlap, sequence length, the decoder's, micro-batch size"
"""What stages have to agree on, in the order of `_of_chunk`."""


def check_stages(
    chunks: Sequence[Any], config: Any, group: Any, arguments: Mapping[str, Any]
) -> None:
    """Check that all stages have sites and agree, or none has and no streams are exchanged.

    A model's first training step and its first evaluation, which may have other lengths and another
    micro-batch, are a collective over the pipeline's ranks each; later ones look at what it found.
    It runs for an ordinary model too: a stage without sites cannot know what others have.

    Args:
        chunks: the model chunks of this rank, wrapped or not.
        config: the model's TransformerConfig.
        group: the pipeline's process group; anything else (None) asks no other rank.
        arguments: what the schedule was called with, by keyword.

    Raises:
        ValueError: on every rank: a chunk without sites beside others that have them; stages that
            differ in what is EXCHANGED; a model without sites whose TransformerConfig a model with
            sites was built with.
    """
    found = state_of(chunks[0]).has_sites
    kind = bool(arguments.get("forward_only"))
    if kind not in found:
        found[kind] = _have_sites([_of_chunk(chunk, arguments) for chunk in chunks], group)
    if is_marked(config) and not found[kind]:
        raise ValueError(
            "this model has no mHC, but its TransformerConfig has served to build one that does,"
            " and its pipeline stages would exchange streams: give each model its own"
            " TransformerConfig (a new one: a copy keeps the mark)"
        )


def _of_chunk(chunk: Any, arguments: Mapping[str, Any]) -> tuple[int | str | None, ...] | None:
    """What this model chunk exchanges; None where it has no site."""
    layers = [m for m in chunk.modules() if isinstance(m, MHCLayer) and not m.is_mtp]
    if not layers:
        return None
    config, mhc = layers[0].config, layers[0].mhc
    ahead = mhc.overlap_in_flight if mhc.overlap_p2p else 0
    # no product of them: messages of another shape that fill as many bytes would pass
    streams = f"{mhc.num_streams}, delayed" if mhc.delayed else mhc.num_streams
    model = (streams, config.hidden_size, str(config.pipeline_dtype), ahead)
    if config.variable_seq_lengths:  # Megatron's stages tell each other
        return model
    # both lengths: 1F1B sends the decoder's where there is one, the interleaved schedule never
    lengths = (arguments["seq_length"], arguments.get("decoder_seq_length"))
    return (*model, *lengths, arguments["micro_batch_size"])


def _have_sites(mine: list[tuple[int | str | None, ...] | None], group: Any) -> bool:
    """Whether this model has mHC, after it is clear that every stage thinks the same."""
    stages: list[Any] = [mine]
    if isinstance(group, torch.distributed.ProcessGroup):
        stages = [None] * group.size()
        torch.distributed.all_gather_object(stages, mine, group=group)
    described = "; ".join(f"stage {i}: {stage}" for i, stage in enumerate(stages))
    flat = {chunk for stage in stages for chunk in stage}
    if None in flat and len(flat) > 1:
        raise ValueError(
            "a pipeline stage or model chunk has no layer with mHC, so no site, and mHC needs"
            " one on each (one of multi-token prediction does not count: it reads one stream). Give"
            " every stage a layer (fewer stages, another split)."
            f" ({EXCHANGED}) of each chunk: {described}"
        )
    if len(flat) > 1:
        raise ValueError(
            "pipeline stages differ in what they exchange; start all of them with the same flags."
            f" ({EXCHANGED}) of each chunk: {described}"
        )
    return None not in flat
