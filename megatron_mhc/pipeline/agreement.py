"""What is checked of a pipeline's stages before a step: that they exchange what they mean to."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.utils import get_model_config

from megatron_mhc.config import MHCConfig
from megatron_mhc.model.arrange import BLOCKS
from megatron_mhc.model.config_marks import is_marked, mark_streams
from megatron_mhc.model.layer import MHCLayer

from .state import state_of

EXCHANGED = "streams, hidden size, dtype, overlap, sequence length, the decoder's, micro-batch size"
"""What stages have to agree on, in the order of `_of_chunk`."""


def check_stages(
    chunks: Sequence[Any], config: Any, group: Any, arguments: Mapping[str, Any]
) -> None:
    """Check that all stages have sites and agree, or none has and no streams are exchanged.

    A stage without layers has neither: it learns here what the others exchange.

    A model's first training step and its first evaluation, which may have other lengths and another
    micro-batch, are a collective over the pipeline's ranks each; later ones look at what it found.
    It runs for an ordinary model too: a stage without sites cannot know what others have.

    Args:
        chunks: the model chunks of this rank, wrapped or not.
        config: the model's TransformerConfig.
        group: the pipeline's process group; anything else (None) asks no other rank.
        arguments: what the schedule was called with, by keyword.

    Raises:
        ValueError: on every rank: a chunk of layers without sites beside others that have them;
            stages that differ in what is EXCHANGED; a stage without layers under a schedule that
            overlaps; a model without sites whose TransformerConfig a model with sites was built
            with.
    """
    found = state_of(chunks[0]).has_sites
    kind = bool(arguments.get("forward_only"))
    if kind not in found:
        mhc, has_bare = _agreed([_of_chunk(chunk, arguments) for chunk in chunks], chunks, group)
        found[kind] = mhc is not None
        if mhc is not None:
            mark_streams(config, mhc)
            if has_bare:
                _check_bare(config, mhc)
    if is_marked(config) and not found[kind]:
        raise ValueError(
            "this model has no mHC, but its TransformerConfig has served to build one that does,"
            " and its pipeline stages would exchange streams: give each model its own"
            " TransformerConfig (a new one: a copy keeps the mark)"
        )


Exchanged = tuple[int | str | None, ...]
"""What a model chunk exchanges (EXCHANGED); a chunk without layers leaves open what is BARE."""
BARE = None


def _layers(chunk: Any) -> list[MHCLayer]:
    return [m for m in chunk.modules() if isinstance(m, MHCLayer) and not m.is_mtp]


def _is_bare(chunk: Any) -> bool:
    """Whether this chunk's blocks have no layers."""
    blocks = [module for module in chunk.modules() if isinstance(module, BLOCKS)]
    return bool(blocks) and not any(len(block.layers) for block in blocks)


def _of_chunk(chunk: Any, arguments: Mapping[str, Any]) -> Exchanged | None:
    """What this model chunk exchanges; None where it has layers and no site."""
    layers = _layers(chunk)
    if not layers and not _is_bare(chunk):
        return None
    config = get_model_config(chunk)
    streams: int | str | None = BARE
    ahead: int | None = BARE
    if layers:
        mhc = layers[0].mhc
        ahead = mhc.overlap_in_flight if mhc.overlap_p2p else 0
        # no product of them: messages of another shape that fill as many bytes would pass
        streams = f"{mhc.num_streams}, delayed" if mhc.delayed else mhc.num_streams
    model = (streams, config.hidden_size, str(config.pipeline_dtype), ahead)
    if config.variable_seq_lengths:  # Megatron's stages tell each other
        return model
    # both lengths: 1F1B sends the decoder's where there is one, the interleaved schedule never
    lengths = (arguments["seq_length"], arguments.get("decoder_seq_length"))
    return (*model, *lengths, arguments["micro_batch_size"])


def _agreed(
    mine: list[Exchanged | None], chunks: Sequence[Any], group: Any
) -> tuple[MHCConfig | None, bool]:
    """The settings of this model's mHC (None without it) and whether some chunk has no layers,
    after it is clear that every stage thinks the same."""
    layers = [layer for chunk in chunks for layer in _layers(chunk)]
    both: list[Any] = [(mine, layers[0].mhc if layers else None)]
    if isinstance(group, torch.distributed.ProcessGroup):
        of_this_stage, both = both[0], [None] * group.size()
        torch.distributed.all_gather_object(both, of_this_stage, group=group)
    stages = [exchanged for exchanged, _ in both]
    mhc: MHCConfig | None = next((mhc for _, mhc in both if mhc is not None), None)
    if mhc is None:
        return None, False
    described = "; ".join(f"stage {i}: {stage}" for i, stage in enumerate(stages))
    described = f" ({EXCHANGED}) of each chunk: {described}"
    flat = {chunk for stage in stages for chunk in stage}
    if None in flat:
        raise ValueError(
            "a pipeline stage or model chunk has layers and none with mHC, so no site, and mHC"
            " needs them in all (one of multi-token prediction does not count: it reads one"
            f" stream). Put with_mhc around all layers.{described}"
        )
    full = next(chunk for chunk in flat if chunk[0] is not BARE)
    if len({_filled(chunk, full) for chunk in flat}) > 1:
        raise ValueError(
            "pipeline stages differ in what they exchange; start all of them with the same flags."
            f"{described}"
        )
    return mhc, any(chunk[0] is BARE for chunk in flat)


def _check_bare(config: Any, mhc: MHCConfig) -> None:
    """Refuse what reads a stage's layers to know its links."""
    overlaps = {
        "--mhc-overlap-p2p (overlap_p2p)": mhc.overlap_p2p,
        "--overlap-moe-expert-parallel-comm": config.overlap_moe_expert_parallel_comm,
    }
    if given := [flag for flag, is_on in overlaps.items() if is_on]:
        raise ValueError(
            f"{' and '.join(given)} with mHC, and a pipeline stage or model chunk has no layers:"
            " its messages are not overlapped. Give every one a layer, or drop the flag"
        )


def _filled(chunk: Exchanged, full: Exchanged) -> Exchanged:
    """What a chunk exchanges, with what it leaves open as another one says."""
    if chunk[0] is not BARE:
        return chunk
    return (full[0], *chunk[1:3], full[3], *chunk[4:])
