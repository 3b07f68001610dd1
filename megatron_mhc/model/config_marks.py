"""What a model with mHC notes on its TransformerConfig, for what Megatron hands no model."""

from typing import Any

from megatron_mhc.config import MHCConfig
from megatron_mhc.costs.sites import PATTERN

STREAMS = "mhc_num_streams"
IN_FLIGHT = "mhc_overlap_in_flight"
"""The attributes that a layer with sites leaves on its TransformerConfig."""


def mark_streams(config: Any, mhc: MHCConfig) -> None:
    """Note on a model's TransformerConfig how many streams its stages exchange, and how.

    Every layer does it: those of a model, its chunks and its multi-token prediction say the same.

    Raises:
        ValueError: layers with other settings were built with the same TransformerConfig.
    """
    mark = (mhc.num_streams, mhc.overlap_in_flight if mhc.overlap_p2p else 0)
    before = (streams_of(config), overlap_in_flight_of(config))
    if is_marked(config) and before != mark:
        raise ValueError(
            "a model with mHC was built with this TransformerConfig before: it has (streams,"
            f" microbatches ahead) {before}, this one {mark}, and the pipeline reads them there:"
            " give each model its own TransformerConfig"
        )
    setattr(config, STREAMS, mark[0])
    setattr(config, IN_FLIGHT, mark[1])


def mark_pattern(config: Any, pattern: str | None) -> None:
    """Note a HybridModel's layer pattern, which Megatron's TransformerConfig does not have."""
    setattr(config, PATTERN, pattern)


def is_marked(config: Any) -> bool:
    """Whether a model with mHC was built with this configuration."""
    return hasattr(config, STREAMS)


def streams_of(config: Any) -> int:
    """How many streams the stages of a model with this configuration exchange: 1 without mHC."""
    return getattr(config, STREAMS, 1)


def overlap_in_flight_of(config: Any) -> int:
    """`MHCConfig.overlap_in_flight` of a model that overlaps its communication, else 0."""
    return getattr(config, IN_FLIGHT, 0)
