"""Expert-parallel overlap: layers cut into nodes train as whole ones."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_mhc.model.site import INLINE
from megatron_mhc.patches.supported_versions import is_installed
from megatron_mhc.pipeline import expert_overlap
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
    "microbatches": 4,
    "batch": 8,
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
FOUR: dict[str, dict[str, Any]] = {
    "virtual stages": {"parallel": VIRTUAL},
    "virtual stages, shared experts": {"parallel": VIRTUAL, "config": SHARED},
}


def both(cases: dict[str, dict[str, Any]], processes: int) -> dict[str, Any]:
    """Every case in stock order, and overlapped."""
    scenarios: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        whole = BASE | case
        config = whole.get("config", {})
        early = {k: v for k, v in config.items() if not k.startswith("ep_overlap")}
        scenarios[f"{name}, stock"] = whole | {"config": early}
        scenarios[name] = whole | {"config": config | OVERLAP}
    return run_scenarios(processes, scenarios)


@pytest.mark.parametrize("case", CASES)
def test_nodes_train_as_whole_layers(case: str) -> None:
    results = both(CASES, 2)
    assert_same_training(results[case], results[f"{case}, stock"], bound=SUMMATION_ORDER)
    assert results[case]["losses"][-1] != results[case]["losses"][0]


@pytest.mark.parametrize("case", FOUR)
def test_nodes_of_virtual_stages_train_as_whole_layers(case: str) -> None:
    results = both(FOUR, 4)
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
