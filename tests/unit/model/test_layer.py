"""Which sites of a layer may be fused: those with no end of a graph or a node between them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_mhc import MHCConfig
from megatron_mhc.config import CONVENTIONS
from megatron_mhc.model import layer, regions, stack

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
        (GRAPHS, "attn", True, True),  # which holds no site
        (GRAPHS, "mlp", False, False),
        (GRAPHS, "attn mlp", True, False),
        (GRAPHS, "attn moe", False, True),
        (GRAPHS, "attn moe_router", False, True),
        (GRAPHS, "attn moe_router moe_preprocess", False, True),
        (GRAPHS, "moe_router", False, False),
        (OVERLAP, "", False, True),
        ({**GRAPHS, **OVERLAP}, "attn", False, False),
        ({**GRAPHS, **OVERLAP}, "attn moe_router", False, True),
    ],
    ids=str,
)
def test_attention_and_mlp_are_fused_where_one_graph_or_node_holds_both_slots(
    settings: dict[str, Any], modules: str, dense: bool, moe: bool
) -> None:
    assert regions.is_one_region(config(settings, modules), False) == dense
    assert regions.is_one_region(config(settings, modules), True) == moe


@pytest.mark.parametrize(
    ("settings", "modules", "fused"),
    [
        ({}, "", True),
        ({"cuda_graph_impl": "full_iteration"}, "", True),
        ({"recompute_granularity": "selective"}, "", True),
        ({"recompute_granularity": "full"}, "", False),
        ({"cuda_graph_impl": "local"}, "", False),
        (GRAPHS, "", False),
        (GRAPHS, "attn", True),
        (GRAPHS, "attn moe_router", False),
        (OVERLAP, "", False),
        ({"cpu_offloading": True}, "", False),
        ({**GRAPHS, **OVERLAP}, "attn", False),
    ],
    ids=str,
)
def test_layers_are_fused_where_nothing_begins_between_them(
    settings: dict[str, Any], modules: str, fused: bool
) -> None:
    assert regions.runs_on_into_the_next(config(settings, modules)) == fused


def test_the_norms_are_asked_again_where_megatron_has_asked_them() -> None:
    """From 0.20 on it keeps their answers, from before there were sites; 0.19 has none to keep."""
    site = SimpleNamespace(returns_residual=True)
    asked = SimpleNamespace(
        input_layernorm=site,
        pre_mlp_layernorm=site,
        _input_layernorm_returns_residual=False,
        _pre_mlp_layernorm_returns_residual=False,
    )
    layer._ask_the_norms_again(asked)
    assert asked._input_layernorm_returns_residual and asked._pre_mlp_layernorm_returns_residual
    never = SimpleNamespace(input_layernorm=site, pre_mlp_layernorm=site)
    layer._ask_the_norms_again(never)
    assert vars(never).keys() == {"input_layernorm", "pre_mlp_layernorm"}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_what_makes_one_stream_of_n_at_the_end(name: str) -> None:
    ours: Any = SimpleNamespace(mhc=MHCConfig(convention=name), head=lambda x: x[..., 3, :])
    x, h_pre = torch.randn(3, 2, 4, 8), torch.rand(3, 2, 4)
    wanted = {"mean": x.mean(-2), "head": x[..., 3, :], "last_pre": (h_pre[..., None] * x).sum(-2)}
    # a sum of four in another order
    torch.testing.assert_close(layer.MHCLayer._contract(ours, x, h_pre), wanted[ours.mhc.end])


def test_a_stack_with_sites_on_some_layers_alone_is_refused() -> None:
    ours, theirs = layer.MHCLayer.__new__(layer.MHCLayer), torch.nn.Identity()
    with pytest.raises(ValueError, match="has layers with mHC and Identity without"):
        stack.place(SimpleNamespace(layers=[ours, theirs]))
    stack.place(SimpleNamespace(layers=[theirs, theirs]))  # an ordinary one stays as it is
