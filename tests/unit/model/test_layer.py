"""Which sites of a layer may be fused: those with no end of a graph or a node between them."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_mhc.model import layer

PLAIN = {
    "cuda_graph_impl": "none",
    "cuda_graph_modules": [],
    "overlap_moe_expert_parallel_comm": False,
    "cpu_offloading": False,
    "recompute_granularity": None,
}
GRAPHS = {"cuda_graph_impl": "transformer_engine"}
OVERLAP = {"overlap_moe_expert_parallel_comm": True}


def config(settings: dict[str, Any], modules: str = "") -> SimpleNamespace:
    """What the rules read of a TransformerConfig."""
    held = [SimpleNamespace(name=name) for name in modules.split()]
    return SimpleNamespace(**{**PLAIN, **settings, "cuda_graph_modules": held})


@pytest.mark.parametrize(
    ("settings", "modules", "dense", "moe"),
    [
        ({}, "", True, True),
        ({"cuda_graph_impl": "local"}, "", True, True),
        (GRAPHS, "", True, True),
        (GRAPHS, "attn", False, False),
        (GRAPHS, "mlp", False, False),
        (GRAPHS, "attn mlp", True, False),
        (GRAPHS, "attn moe", False, True),
        (GRAPHS, "attn moe_router", False, True),
        (GRAPHS, "attn moe_router moe_preprocess", False, True),
        (GRAPHS, "moe_router", False, False),
        (OVERLAP, "", False, True),
        ({**GRAPHS, **OVERLAP}, "attn moe_router", False, True),
    ],
    ids=str,
)
def test_attention_and_mlp_are_fused_where_one_graph_or_node_holds_both_slots(
    settings: dict[str, Any], modules: str, dense: bool, moe: bool
) -> None:
    assert layer._is_one_region(config(settings, modules), False) == dense
    assert layer._is_one_region(config(settings, modules), True) == moe


@pytest.mark.parametrize(
    ("settings", "fused"),
    [
        ({}, True),
        ({"cuda_graph_impl": "full_iteration"}, True),
        ({"recompute_granularity": "selective"}, True),
        ({"recompute_granularity": "full"}, False),
        ({"cuda_graph_impl": "local"}, False),
        (GRAPHS, False),
        (OVERLAP, False),
        ({"cpu_offloading": True}, False),
    ],
    ids=str,
)
def test_layers_are_fused_where_nothing_begins_between_them(
    settings: dict[str, Any], fused: bool
) -> None:
    assert layer._runs_on_into_the_next(config(settings)) == fused
