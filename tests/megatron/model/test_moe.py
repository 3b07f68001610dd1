"""Mixtures of experts with mHC: routers, balancing losses, shared experts, dense layers, MLA."""

from typing import Any

import pytest

from tests.megatron.common.compare import assert_same_training
from tests.megatron.common.launch import run_scenarios
from tests.megatron.common.settings import SGD, SUMMATION_ORDER

SHARED = {"moe_shared_expert_intermediate_size": 64}
DENSE_FIRST = {"moe_layer_freq": [0, 1, 1, 1]}
VARIANTS: dict[str, dict[str, Any]] = {
    "shared experts": {"config": SHARED},
    "dense layers first": {"config": DENSE_FIRST},
    "aux loss": {
        "config": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
    },
    "sequence aux loss, z loss": {
        "config": {
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_aux_loss_coeff": 0.1,
            "moe_z_loss_coeff": 1e-2,
        }
    },
    "sinkhorn router": {
        "config": {"moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": 1}
    },
    "sigmoid router with expert bias": {
        "config": {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_load_balancing_type": "none",
        }
    },
    "DeepSeek": {
        "kind": "mla moe",
        "tied": False,
        "config": {
            **SHARED,
            **DENSE_FIRST,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "moe_router_score_function": "sigmoid",
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_aux_loss_coeff": 1e-2,
        },
    },
    "a norm of one's own": {"kind": "own norm"},
}
TRAINED: dict[str, dict[str, Any]] = {
    "aux loss": {"optimizer": SGD, "kind": "moe", **VARIANTS["aux loss"]},
    "DeepSeek": {"optimizer": SGD, **VARIANTS["DeepSeek"]},
}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
EXPERT_PARALLEL = {"microbatches": 1, "parallel": {"expert_model_parallel_size": 2}}


def single() -> dict[str, Any]:
    """Every variant, ordinary and with mHC, and what the two processes are compared with."""
    scenarios: dict[str, dict[str, Any]] = {}
    for name, settings in VARIANTS.items():
        start = {"perturb": False, "kind": "moe", **settings}
        scenarios[f"{name}, ordinary"] = {**start, "steps": 1, "mhc": None}
        scenarios[name] = {**start, "steps": 5, "optimizer": {"lr": 3e-3}}
    scenarios |= {f"{name}, trained": settings for name, settings in TRAINED.items()}
    return run_scenarios(1, scenarios)


def pair() -> dict[str, Any]:
    """The trained ones, experts over two processes, by both dispatchers."""
    scenarios = {}
    for name, settings in TRAINED.items():
        scenarios[name] = settings | EXPERT_PARALLEL
        allgather = {"config": settings["config"] | ALLGATHER}
        scenarios[f"{name}, allgather"] = settings | EXPERT_PARALLEL | allgather
    return run_scenarios(2, scenarios)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_starts_as_the_ordinary_model_and_trains(variant: str) -> None:
    results = single()
    losses = results[variant]["losses"]
    # weights that sum to one in fp32, over 8 sites: a few roundings of 6e-8
    assert losses[0] == pytest.approx(results[f"{variant}, ordinary"]["losses"][0], rel=1e-6)
    assert losses[-1] < losses[0] - 0.05
    gradients = results[variant]["gradients"][1]
    assert len(gradients) == 8 * 3
    assert not [name for name, gradient in gradients.items() if gradient.norm() == 0]


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("dispatcher", ["", ", allgather"], ids=["alltoall", "allgather"])
def test_expert_parallel_ranks_train_as_one_process(kind: str, dispatcher: str) -> None:
    """Shared experts, a dense layer and balancing losses, which are a microbatch's own."""
    got, want = pair()[f"{kind}{dispatcher}"], single()[f"{kind}, trained"]
    assert_same_training(got, want, bound=SUMMATION_ORDER)


def test_the_balancing_loss_is_on() -> None:
    """It moves the routers, and nothing else of the losses compared above would show that."""
    results = single()
    got = results["aux loss, trained"]["parameters"]
    routers = [name for name in got if name.endswith("router.weight")]
    assert len(routers) == 4
    plain = run_scenarios(1, {"plain": {"optimizer": SGD, "kind": "moe"}})["plain"]["parameters"]
    assert all((got[name] - plain[name]).norm() > 1e-3 * plain[name].norm() for name in routers)
