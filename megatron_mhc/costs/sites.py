"""How many sites a model has: two a layer in a GPT, one in a HybridModel, by its pattern."""

from typing import Any, NamedTuple

PATTERN = "hybrid_layer_pattern"
"""Megatron's argument, and what the TransformerConfig of a HybridModel with mHC gets to know."""

_NEXT_STAGE, _MTP = "|", "/"
"""What is no layer in a pattern: the bounds of pipeline stages, and of multi-token prediction."""


def hybrid_pattern(settings: Any) -> str | None:
    """The layer pattern of a HybridModel, None for a GPT.

    Args:
        settings: Megatron's parsed arguments, or the TransformerConfig of a model with mHC.
    """
    return getattr(settings, PATTERN, None) or None


def segments_of(pattern: str) -> list[int]:
    """The layers of each pipeline segment; one segment where the pattern does not say."""
    return [len(segment) for segment in pattern.split(_MTP)[0].split(_NEXT_STAGE)]


def distinct_mtp_layers(settings: Any) -> int:
    """How many layers of multi-token prediction a model has, which may be fewer than its depths.

    Args:
        settings: a TransformerConfig, or Megatron's parsed arguments. With their
            `mtp_use_repeated_layer` one layer runs at every depth.
    """
    depths = settings.mtp_num_layers or 0
    return min(depths, 1) if getattr(settings, "mtp_use_repeated_layer", False) else depths


class Sites(NamedTuple):
    """The sites of a whole model.

    Attributes:
        decoder: those of the decoder.
        mtp: those at one depth of multi-token prediction.
        mtp_layers: depths with parameters of their own.
        mtp_depths: depths that run.
    """

    decoder: int
    mtp: int = 0
    mtp_layers: int = 0
    mtp_depths: int = 0

    @classmethod
    def of(cls, settings: Any) -> "Sites":
        """Those of a model.

        Args:
            settings: Megatron's parsed arguments, or the TransformerConfig of a model with mHC.
        """
        depths = (distinct_mtp_layers(settings), settings.mtp_num_layers or 0)
        pattern = hybrid_pattern(settings)
        if pattern is None:
            return cls(2 * settings.num_layers, 2, *depths)
        mtp = pattern.split(_MTP)[1:2]
        return cls(sum(segments_of(pattern)), sum(map(len, mtp)), *depths)

    @property
    def built(self) -> int:
        """Sites with parameters of their own."""
        return self.decoder + self.mtp * self.mtp_layers

    @property
    def run(self) -> int:
        """Sites that a token passes."""
        return self.decoder + self.mtp * self.mtp_depths
