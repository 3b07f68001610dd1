"""What is checked of a pipeline's stages before a step: that they exchange what they mean to."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from megatron_mhc.config import MHCConfig
from megatron_mhc.model.arrange import BLOCKS, arrange
from megatron_mhc.model.bare_conflicts import refusal
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
            stages that differ in what is EXCHANGED; a stage without layers beside what does not
            work with one (`_check_bare`); a model without sites whose TransformerConfig a model
            with sites was built with.
    """
    found = state_of(chunks[0]).has_sites
    kind = bool(arguments.get("forward_only"))
    if kind not in found:
        mhc = _agreed(_said(chunks, arguments), config, group)
        found[kind] = mhc is not None
        if mhc is not None:
            mark_streams(config, mhc)
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
    """Whether this chunk's blocks have no layers, but for those of multi-token prediction."""
    blocks = [module for module in chunk.modules() if isinstance(module, BLOCKS)]
    layers = [layer for block in blocks for layer in block.layers]
    return bool(blocks) and all(isinstance(one, MHCLayer) and one.is_mtp for one in layers)


def _predicts_apart(chunk: Any) -> bool:
    """Whether multi-token prediction stands in this chunk, and the loss in another."""
    predicts = any(isinstance(m, MHCLayer) and m.is_mtp for m in chunk.modules())
    return predicts and not get_attr_wrapped_model(chunk, "post_process")


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


class _Said(NamedTuple):
    """What a stage tells the others.

    Attributes:
        chunks: what each of its chunks exchanges.
        mhc: the settings of its layers; None without any.
        enters, leaves: whether one of its layers replicates one stream, or contracts to one.
        predicts_apart: `_predicts_apart`, of any of its chunks.
    """

    chunks: list[Exchanged | None]
    mhc: MHCConfig | None
    enters: bool
    leaves: bool
    predicts_apart: bool


def _said(chunks: Sequence[Any], arguments: Mapping[str, Any]) -> _Said:
    for chunk in chunks:
        for block in chunk.modules():
            if isinstance(block, BLOCKS):
                arrange(block)  # before it is asked which layers are the ends
    layers = [layer for chunk in chunks for layer in _layers(chunk)]
    return _Said(
        chunks=[_of_chunk(chunk, arguments) for chunk in chunks],
        mhc=layers[0].mhc if layers else None,
        enters=any(layer.is_entry for layer in layers),
        leaves=any(layer.is_exit for layer in layers),
        predicts_apart=any(map(_predicts_apart, chunks)),
    )


def _agreed(mine: _Said, config: Any, group: Any) -> MHCConfig | None:
    """The settings of this model's mHC, None without, after it is clear that every stage thinks the
    same."""
    stages = [mine]
    if isinstance(group, torch.distributed.ProcessGroup):
        stages = [mine] * group.size()
        torch.distributed.all_gather_object(stages, mine, group=group)
    mhc = next((stage.mhc for stage in stages if stage.mhc is not None), None)
    if mhc is None:
        return None
    described = "; ".join(f"stage {i}: {stage.chunks}" for i, stage in enumerate(stages))
    described = f" ({EXCHANGED}) of each chunk: {described}"
    every = {chunk for stage in stages for chunk in stage.chunks}
    flat = {chunk for chunk in every if chunk is not None}
    if len(flat) < len(every):
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
    if any(chunk[0] is BARE for chunk in flat):
        _check_bare(stages, config)
    return mhc


def _check_bare(stages: Sequence[_Said], config: Any) -> None:
    """Refuse what does not work where some stage or chunk has no layers."""
    if said := refusal(config, any(stage.predicts_apart for stage in stages)):
        raise ValueError(said)
    ends = {"first": any(s.enters for s in stages), "last": any(s.leaves for s in stages)}
    if absent := [which for which, is_there in ends.items() if not is_there]:
        raise ValueError(
            f"the model's {' and '.join(absent)} layer is gone, where the streams begin or end, and"
            " the embedding or the loss stands on a pipeline stage without layers, which cannot"
            " take its place: keep that layer, or give that stage one"
        )


def _filled(chunk: Exchanged, full: Exchanged) -> Exchanged:
    """What a chunk exchanges, with what it leaves open as another one says."""
    if chunk[0] is not BARE:
        return chunk
    return (full[0], *chunk[1:3], full[3], *chunk[4:])
