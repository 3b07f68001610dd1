"""What a model with mHC notes on its TransformerConfig, for what Megatron hands no model."""

from typing import Any

from megatron_mhc.config import MHCConfig
from megatron_mhc.costs.sites import PATTERN

from .columns import extra_columns

STREAMS = "mhc_num_streams"
IN_FLIGHT = "mhc_overlap_in_flight"
EXTRA = "mhc_extra_columns"
"""The attributes that a layer with sites leaves on its TransformerConfig."""


def mark_streams(config: Any, mhc: MHCConfig) -> None:
    """Note on a model's TransformerConfig how many streams its stages exchange, and how.

    Every layer does it: those of a model, its chunks and its multi-token prediction say the same.

    Raises:
        ValueError: layers with other settings were built with the same TransformerConfig.
    """
    extra = extra_columns(mhc, config.params_dtype) if mhc.delayed else 0
    mark = (mhc.num_streams, mhc.overlap_in_flight if mhc.overlap_p2p else 0)
    before = (streams_of(config), overlap_in_flight_of(config))
    if is_marked(config) and getattr(config, EXTRA) != extra:
        raise ValueError(
            "a model with mHC was built with this TransformerConfig before, and one of the two has"
            " delayed sites: give each model its own TransformerConfig"
        )
    if is_marked(config) and before != mark:
        raise ValueError(
            "a model with mHC was built with this TransformerConfig before: it has (streams,"
            f" microbatches ahead) {before}, this one {mark}, and the pipeline reads them there:"
            " give each model its own TransformerConfig"
        )
    setattr(config, STREAMS, mark[0])
    setattr(config, IN_FLIGHT, mark[1])
    setattr(config, EXTRA, extra)


def mark_pattern(config: Any, pattern: str | None) -> None:
    """Note a HybridModel's layer pattern, which Megatron's TransformerConfig does not have."""
    setattr(config, PATTERN, pattern)


def is_marked(config: Any) -> bool:
    """Whether a model with mHC was built with this configuration."""
    return hasattr(config, STREAMS)


def streams_of(config: Any) -> int:
    """How many streams the stages of a model with this configuration exchange: 1 without mHC."""
    return getattr(config, STREAMS, 1)


def message_width(config: Any) -> int | None:
    """Channels of what the stages of a model with this configuration exchange: those of n streams,
    and of their H_pre where sites are delayed. None without mHC."""
    if not is_marked(config):
        return None
    return int(streams_of(config) * config.hidden_size + getattr(config, EXTRA))


def overlap_in_flight_of(config: Any) -> int:
    """`MHCConfig.overlap_in_flight` of a model that overlaps its communication, else 0."""
    return getattr(config, IN_FLIGHT, 0)
