"""CUDA graphs of layers, as far as a CPU allows: sample inputs, and whose parameters are gathered.

Megatron's helper asks each layer for both; what it then captures is run here without a graph.
"""

from typing import Any

import pytest

from megatron_mhc.patches.supported_versions import is_installed
from tests.megatron.common.launch import run_scenarios
from tests.megatron.common.scenario import SEQUENCE

pytestmark = pytest.mark.skipif(is_installed("<0.19"), reason="refused there")

BATCH, WIDTH, STREAMS = 2, 64, 4
OVERLAP = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
HEAD = {"convention": "deepseek_v4"}
DELAYED = {"convention": "deepseek_v4_1"}
COLUMNS = 3 * STREAMS
"""Of H_pre behind bf16 streams, where sites are delayed."""
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "whole": ([], {}),
    "whole, learned head": ([], {"mhc": HEAD}),
    "whole, ordinary": ([], {"mhc": None}),
    "attn": (["attn"], {}),
    "mlp": (["mlp"], {}),
    "attn mlp": (["attn", "mlp"], {}),
    "attn mlp, learned head": (["attn", "mlp"], {"mhc": HEAD}),
    "whole, delayed": ([], {"mhc": DELAYED}),
    "attn mlp, delayed": (["attn", "mlp"], {"mhc": DELAYED}),
    "mlp, delayed": (["mlp"], {"mhc": DELAYED}),
    "attn moe_router, delayed": (["attn", "moe_router"], {"kind": "moe", "mhc": DELAYED}),
    "attn, experts": (["attn"], {"kind": "moe"}),
    "attn moe_router": (["attn", "moe_router"], {"kind": "moe"}),
    "attn moe_router moe_preprocess": (
        ["attn", "moe_router", "moe_preprocess"],
        {"kind": "moe"},
    ),
}


def layers(case: str) -> list[dict[str, Any]]:
    """What the worker found for each layer; all cases in one launch."""
    scenarios = {}
    for name, (modules, settings) in CASES.items():
        graphs = {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": modules}
        scenarios[name] = {"bf16": True, "ddp": OVERLAP, "batch": BATCH, **settings}
        scenarios[name]["config"] = graphs
    results = run_scenarios(1, scenarios, worker="model.graphs_worker")
    found: list[dict[str, Any]] = results[case]["layers"]
    return found


def holds_attention_alone(case: str) -> bool:
    """A graph of attention alone is norm(u) to f, outside every site."""
    return CASES[case][0] == ["attn"]


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_captured_with_what_it_is_given_in_training(case: str) -> None:
    found = layers(case)
    width = WIDTH if "ordinary" in case or holds_attention_alone(case) else STREAMS * WIDTH
    width += COLUMNS * ("delayed" in case)
    given = [layer["given"] for layer in found]
    first = width if case.startswith("mlp") else WIDTH  # attention has made streams of it
    assert given == [(SEQUENCE, BATCH, first), *[(SEQUENCE, BATCH, width)] * 3]
    assert all(layer["learns"] for layer in found)
    if "moe_router" not in case:  # what a router leaves is no layer's input
        made = [layer["made"] for layer in found]
        assert made == [*[(SEQUENCE, BATCH, width)] * 3, (SEQUENCE, BATCH, WIDTH)]


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_gathered_for_all_that_is_captured(case: str) -> None:
    for layer in layers(case):
        assert layer["called"] and layer["hooked"] == layer["called"]
    ours = {name for name in layers(case)[-1]["called"] if "connection" in name or name == "head"}
    sites = {"attention_connection"} if "attn" in case or "whole" in case else set()
    sites |= {"mlp_connection"}
    if "ordinary" in case or holds_attention_alone(case):
        sites = set()
    assert ours == sites | ({"head"} if "head" in case else set())
