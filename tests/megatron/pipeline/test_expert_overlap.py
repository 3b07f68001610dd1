"""Expert-parallel overlap: layers cut into nodes train as whole ones."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_mhc.model.site import INLINE
from megatron_mhc.patches.supported_versions import is_installed
from megatron_mhc.pipeline import expert_overlap
from tests.megatron.common.cases import beside, parameters
from tests.megatron.common.compare import assert_same_training
from tests.megatron.common.launch import run_scenarios
from tests.megatron.common.settings import DELAYED, SGD

OVERLAP = {"overlap_moe_expert_parallel_comm": True}
SHARED = {"moe_shared_expert_intermediate_size": 64}
MTP = {"mtp_num_layers": 1}
MIXED = {"moe_layer_freq": [0, 1, 0, 1]}
# a node adds up the gradients of its residual in another order, in fp32
SUMMATION_ORDER = 2e-6
BASE = {
    "kind": "moe",
    "steps": 2,
    "optimizer": SGD,  # Adam makes whole steps of roundings where a gradient is almost zero
    "fuse": "layer",
    # the first forward and the last backward are alone; one runs beside one in between
    "microbatches": 3,
    "batch": 6,
    "parallel": {"expert_model_parallel_size": 2},
}
VIRTUAL = {
    "expert_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "experts": {},
    "shared experts": {"config": SHARED},
    "dense layers between": {"config": MIXED},
    "multi-token prediction, shared experts": {"config": MTP | SHARED},
    "learned head, evaluated": {"mhc": {"convention": "deepseek_v4"}, "evaluate": True},
    "delayed sites, shared experts": {"mhc": DELAYED, "config": SHARED},
    "delayed sites, dense layers between": {"mhc": DELAYED, "config": MIXED},
    "hc, attention released early": {
        "mhc": {"variant": "hc"},
        "config": {"ep_overlap_early_attn_memory_release": True},
    },
}
if is_installed("<0.19"):  # where mHC refuses multi-token prediction
    del CASES["multi-token prediction, shared experts"]
STAGES = {"parallel": VIRTUAL, "microbatches": 4, "batch": 8}
FOUR: dict[str, dict[str, Any]] = {
    "virtual stages": STAGES,
    "virtual stages, shared experts": STAGES | {"config": SHARED},
}
THOROUGH = ("shared experts", "delayed sites, dense layers between", "virtual stages")


def both(case: str, cases: dict[str, dict[str, Any]], processes: int) -> dict[str, Any]:
    """A case and those beside it in stock order, and overlapped."""
    scenarios: dict[str, dict[str, Any]] = {}
    for name in beside(case, cases, THOROUGH):
        whole = BASE | cases[name]
        config = whole.get("config", {})
        early = {k: v for k, v in config.items() if not k.startswith("ep_overlap")}
        scenarios[f"{name}, stock"] = whole | {"config": early}
        scenarios[name] = whole | {"config": config | OVERLAP}
    return run_scenarios(processes, scenarios)


def test_a_stage_without_layers_is_refused_with_it() -> None:
    layout = {"pipeline_model_parallel_layout": "E|tt|tt|L"}
    with pytest.raises(AssertionError, match=r"--overlap-moe-expert-parallel-comm .* no layers"):
        run_scenarios(4, {"bad": BASE | STAGES | {"config": OVERLAP | layout}})


@pytest.mark.parametrize("case", parameters(CASES, THOROUGH))
def test_nodes_train_as_whole_layers(case: str) -> None:
    results = both(case, CASES, 2)
    assert_same_training(results[case], results[f"{case}, stock"], bound=SUMMATION_ORDER)
    assert results[case]["losses"][-1] != results[case]["losses"][0]


@pytest.mark.parametrize("case", parameters(FOUR, THOROUGH))
def test_nodes_of_virtual_stages_train_as_whole_layers(case: str) -> None:
    results = both(case, FOUR, 4)
    assert_same_training(results[case], results[f"{case}, stock"], bound=SUMMATION_ORDER)


def test_layers_that_are_left_hand_over_to_each_other() -> None:
    """A layer taken out between two plans: its neighbours share a stream's event from then on."""
    layers = [
        SimpleNamespace(
            mlp=object.__new__(MoELayer),
            attention_site=SimpleNamespace(side_streams=INLINE),
            mlp_site=SimpleNamespace(side_streams=INLINE),
        )
        for _ in range(3)
    ]
    for left in ([0, 1, 2], [0, 2], [0]):
        expert_overlap.hand_over([layers[index] for index in left], lambda: "a stream")
        for one, other in itertools.pairwise(left):
            shared = layers[one].mlp_site.side_streams
            assert shared is layers[other].attention_site.side_streams is not INLINE
        assert layers[left[-1]].mlp_site.side_streams is INLINE


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"config": OVERLAP | {"moe_layer_freq": [1, 0, 1, 0]}}, "forgets the final norm"),
        ({"config": OVERLAP, "mhc": {"recompute": 1}}, "use one of the two"),
    ],
)
def test_what_nodes_cannot_do_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        run_scenarios(2, {"bad": BASE | settings})
