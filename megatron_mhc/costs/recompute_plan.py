"""What recompute of the streams costs and saves, by formula, and the blocks of least memory."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mhc.config import MHCConfig

from .sites import hybrid_pattern, segments_of


@dataclass(frozen=True)
class Plan:
    """The memory of one pipeline stage by the formula of paper 4.3.2, with microbatches in flight.

    Attributes:
        num_streams: n. hidden_size: C.
        chunk_layers: the layers of each model chunk of the stage.
        in_flight: chunks' microbatches between their forward and their backward, at most.
        norms: norms of a layer's sites that are modules of their own, on average: norm(u) is
            dropped there.
        setting: `MHCConfig.recompute`.
        sites: of a layer: 2 in a GPT, 1 in a HybridModel.
    """

    num_streams: int
    hidden_size: int
    chunk_layers: tuple[int, ...]
    in_flight: int
    norms: float
    setting: int | str
    element_size: int = 2
    sites: int = 2

    def kept(self, layers: int) -> float:
        """Block starts kept, in streams of C a token, with blocks of so many layers."""
        starts = [len(blocks(count, layers)) for count in self.chunk_layers]
        return self.in_flight * self.num_streams * sum(starts) / len(starts)

    def rebuilt(self, layers: int) -> float:
        """A rebuilt block: x, u and where it is ours norm(u), in streams of C a token.

        As the paper counts: with the first site's x, which is the block's start and kept already.
        """
        layers = min(layers, max(self.chunk_layers))
        return layers * (self.sites * (self.num_streams + 1) + self.norms)

    @property
    def layers(self) -> int:
        """Layers a block: the setting, or for "auto" the number of least memory."""
        if isinstance(self.setting, int):
            return self.setting
        choices = range(1, max(self.chunk_layers) + 1)
        return min(choices, key=lambda count: self.kept(count) + self.rebuilt(count))

    @property
    def bytes_a_token(self) -> dict[str, float]:
        """What mHC adds to the ordinary model's activations, in bytes a token, term by term.

        block starts, F's outputs and coefficients (fp32: H_pre, H_post, H_res, their n*n + 2n
        logits and 1/r) are kept for every microbatch in flight; one block at a time is rebuilt; the
        ordinary model keeps its residual, and where its norm is a module the norm's output.
        """
        n, wide = self.num_streams, self.hidden_size * self.element_size
        layers = sum(self.chunk_layers) / len(self.chunk_layers) * self.in_flight
        sites = self.sites * layers
        return {
            "block starts": self.kept(self.layers) * wide,
            "rebuilt block": self.rebuilt(self.layers) * wide,
            "F's outputs": sites * wide,
            "coefficients": sites * 4 * (2 * (n * n + 2 * n) + 1),
            "ordinary residual and norm": -(self.sites + self.norms) * layers * wide,
        }

    @property
    def in_words(self) -> str:
        """How the layers are put into blocks, in words."""
        auto = " (auto)" if self.setting == "auto" else ""
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        return f"recompute in blocks of {layers}{auto}"

    def __str__(self) -> str:
        """For the banner: the blocks and their memory, which is that of the Triton kernels."""
        total = sum(self.bytes_a_token.values())
        flight = "1 microbatch" if self.in_flight == 1 else f"{self.in_flight} microbatches"
        return (
            f"{self.in_words}: {total:,.0f} bytes a token beyond the ordinary model, {flight} in"
            " flight"
        )


def blocks(layers: int, block: int) -> list[range]:
    """The layers of each block, where so many layers are put into blocks of at most `block`."""
    return [range(first, min(first + block, layers)) for first in range(0, layers, block)]


def microbatches_in_flight(
    stage: int, stages: int, chunks: int = 1, group: int = 0, ahead: int = 1
) -> int:
    """Chunks' microbatches that a stage holds at most between forward and backward.

    A schedule's warm-up and one more. 1F1B: `ahead` for each stage behind. Interleaved: Megatron's
    (`get_pp_rank_microbatches`).

    Args:
        stage: this pipeline rank of `stages`.
        chunks: model chunks a stage.
        group: `microbatch_group_size_per_vp_stage`, of interest with several chunks.
        ahead: `MHCConfig.overlap_in_flight`, of interest with one.
    """
    behind = stages - stage - 1
    return (ahead * behind if chunks == 1 else 2 * behind + (chunks - 1) * group) + 1


def most_in_flight(config: Any, mhc: MHCConfig, stage: int) -> int:
    """`microbatches_in_flight` of a model's pipeline stage, and no more than a step has.

    Args:
        config: its TransformerConfig.
        mhc: the settings.
        stage: its pipeline rank.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    chunks = config.virtual_pipeline_model_parallel_size or 1
    stages = config.pipeline_model_parallel_size
    group = config.microbatch_group_size_per_vp_stage or stages
    in_flight = microbatches_in_flight(stage, stages, chunks, group, mhc.overlap_in_flight)
    # where Megatron knows how many there are (outside its training loop it does not)
    with contextlib.suppress(AttributeError):
        in_flight = min(in_flight, chunks * get_num_microbatches())
    return in_flight


def plan(config: Any, mhc: MHCConfig, norms: float, stage: int, sites: int = 2) -> Plan:
    """The plan of one pipeline stage, of a model with recompute of the streams.

    Args:
        config: its TransformerConfig.
        mhc: the settings.
        norms, sites: as in `Plan`.
        stage: its pipeline rank.
    """
    assert mhc.recompute is not None
    return Plan(
        mhc.num_streams,
        config.hidden_size,
        _chunk_layers(config, stage),
        most_in_flight(config, mhc, stage),
        norms,
        mhc.recompute,
        config.params_dtype.itemsize,
        sites,
    )


def _chunk_layers(config: Any, stage: int) -> tuple[int, ...]:
    """The layers of each model chunk of a stage: a hybrid pattern's, or as Megatron shares out."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    chunks = config.virtual_pipeline_model_parallel_size or 1
    segments = segments_of(hybrid_pattern(config) or "")
    if len(segments) > 1:
        return tuple(segments[stage :: config.pipeline_model_parallel_size])
    return tuple(
        get_num_layers_to_build(config, chunk if chunks > 1 else None, stage)
        for chunk in range(chunks)
    )


def plan_of(chunks: Iterable[torch.nn.Module]) -> Plan | None:
    """The plan that the layers of these model chunks follow, None without recompute."""
    modules = (module for chunk in chunks for module in chunk.modules())
    plans = (getattr(module, "recompute_plan", None) for module in modules)
    return next((found for found in plans if isinstance(found, Plan)), None)
