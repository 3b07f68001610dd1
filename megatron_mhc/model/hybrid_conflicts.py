"""What a HybridModel with mHC cannot work with, though a GPTModel with it may."""

from collections.abc import Callable
from typing import Any

from megatron_mhc.costs.sites import hybrid_pattern

from .conflict import Conflict, is_set


def _with_pattern(given: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda settings: hybrid_pattern(settings) is not None and given(settings)


HYBRID_CONFLICTS = (
    Conflict(
        "--hybrid-layer-pattern with --overlap-moe-expert-parallel-comm",
        _with_pattern(is_set("overlap_moe_expert_parallel_comm")),
        "Megatron has no schedule of a HybridModel's nodes; drop the flag",
    ),
    Conflict(
        "--hybrid-layer-pattern with --transformer-impl inference_optimized",
        _with_pattern(lambda s: getattr(s, "transformer_impl", None) == "inference_optimized"),
        "Megatron then takes a stack's spec of its own, without mHC; drop the flag",
    ),
    Conflict(
        "--hybrid-layer-pattern with --cuda-graph-impl",
        _with_pattern(is_set("cuda_graph_impl", "none")),
        "CUDA graphs of a HybridModel with mHC are not tried yet; use --cuda-graph-impl none",
    ),
)
