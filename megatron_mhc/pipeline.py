"""Pipeline stages with mHC: the width between them, and the check that all agree on it."""

from collections.abc import Iterable
from typing import Any

import torch

from .config import MHCConfig

STREAMS = "mhc_num_streams"
IN_FLIGHT = "mhc_overlap_in_flight"
"""The attributes that a layer with sites leaves on its TransformerConfig."""


def mark_streams(config: Any, mhc: MHCConfig) -> None:
    """Note on a model's TransformerConfig how many streams its stages exchange, and how."""
    setattr(config, STREAMS, mhc.num_streams)
    setattr(config, IN_FLIGHT, mhc.overlap_in_flight if mhc.overlap_p2p else 0)


def streams_of(config: Any) -> int:
    """How many streams the stages of a model with this configuration exchange: 1 without mHC."""
    return getattr(config, STREAMS, 1)


def overlap_in_flight_of(config: Any) -> int:
    """`MHCConfig.overlap_in_flight` of a model that overlaps its communication, else 0."""
    return getattr(config, IN_FLIGHT, 0)


def check_stages(chunks: Iterable[Any], mhc: MHCConfig) -> None:
    """Check that every stage and chunk of the pipeline has sites, and that all agree on the width.

    A collective over the pipeline's ranks: every one of them calls it.

    Args:
        chunks: the model chunks of this rank, unwrapped or not.
        mhc: the settings of this rank.

    Raises:
        ValueError: a chunk without sites, or stages that differ in width, dtype or overlap; on
            every rank.
    """
    from megatron.core import parallel_state

    from .layer import MHCLayer

    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return
    mine = []
    for chunk in chunks:
        layers = [m for m in chunk.modules() if isinstance(m, MHCLayer) and not m.is_mtp]
        width = layers[0].config.hidden_size * mhc.num_streams if layers else None
        dtype = str(layers[0].config.pipeline_dtype) if layers else None
        mine.append((width, dtype, mhc.overlap_in_flight if mhc.overlap_p2p else 0))
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(stages, mine, group=group)
    described = "; ".join(f"stage {i}: {stage}" for i, stage in enumerate(stages))
    flat = [chunk for stage in stages for chunk in stage]
    if any(width is None for width, *_ in flat):
        raise ValueError(
            "a pipeline stage or model chunk has no Transformer layer, so no site, and mHC needs"
            " one on each (one of multi-token prediction does not count: it reads one stream). Give"
            " every stage a layer (fewer stages, another split)."
            f" (width, dtype, overlap) of each chunk: {described}"
        )
    if len(set(flat)) > 1:
        raise ValueError(
            "pipeline stages differ in streams times hidden size, in dtype or in overlap; start all"
            f" of them with the same flags. (width, dtype, overlap) of each chunk: {described}"
        )
