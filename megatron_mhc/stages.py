"""What is checked of a pipeline's stages before a step: that they exchange what they mean to."""

from collections.abc import Sequence
from typing import Any

import torch

from .layer import MHCLayer
from .pipeline import is_marked

_HAS_SITES = "mhc_has_sites"


def check_stages(chunks: Sequence[Any], config: Any, group: Any) -> None:
    """Check that all stages have sites and agree, or none has and no streams are exchanged.

    A model's first call is a collective over the pipeline's ranks; the later ones look at what it
    found. It runs for an ordinary model too: a stage without sites cannot know what others have.

    Args:
        chunks: the model chunks of this rank, wrapped or not.
        config: the model's TransformerConfig.
        group: the pipeline's process group; anything else (None) asks no other rank.

    Raises:
        ValueError: on every rank: a chunk without sites beside others that have them; stages that
            differ in streams, hidden size, dtype or overlap; a model without sites whose
            TransformerConfig a model with sites was built with.
    """
    kept = vars(chunks[0])
    if _HAS_SITES not in kept:
        kept[_HAS_SITES] = _have_sites(chunks, group)
    if is_marked(config) and not kept[_HAS_SITES]:
        raise ValueError(
            "this model has no mHC, but its TransformerConfig has served to build one that does,"
            " and its pipeline stages would exchange streams: give each model its own"
            " TransformerConfig (a new one: a copy keeps the mark)"
        )


def _have_sites(chunks: Sequence[Any], group: Any) -> bool:
    """Whether this model has mHC, after it is clear that every stage thinks the same."""
    mine: list[tuple[int | None, int | None, str | None, int | None]] = []
    for chunk in chunks:
        layers = [m for m in chunk.modules() if isinstance(m, MHCLayer) and not m.is_mtp]
        if layers:
            config, mhc = layers[0].config, layers[0].mhc
            ahead = mhc.overlap_in_flight if mhc.overlap_p2p else 0
            # not their product: streams of another width that fill as many bytes would pass
            sizes = (mhc.num_streams, config.hidden_size)
            mine.append((*sizes, str(config.pipeline_dtype), ahead))
        else:
            mine.append((None, None, None, None))
    stages: list[Any] = [mine]
    if isinstance(group, torch.distributed.ProcessGroup):
        stages = [None] * group.size()
        torch.distributed.all_gather_object(stages, mine, group=group)
    described = "; ".join(f"stage {i}: {stage}" for i, stage in enumerate(stages))
    flat = {chunk for stage in stages for chunk in stage}
    without = {chunk for chunk in flat if chunk[0] is None}
    if without and flat > without:
        raise ValueError(
            "a pipeline stage or model chunk has no Transformer layer, so no site, and mHC needs"
            " one on each (one of multi-token prediction does not count: it reads one stream). Give"
            " every stage a layer (fewer stages, another split)."
            f" (streams, hidden size, dtype, overlap) of each chunk: {described}"
        )
    if len(flat) > 1:
        raise ValueError(
            "pipeline stages differ in streams, hidden size, dtype or overlap; start all of them"
            " with the same flags. (streams, hidden size, dtype, overlap) of each chunk:"
            f" {described}"
        )
    return not without
