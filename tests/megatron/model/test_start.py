"""A new model with mHC computes the ordinary one's function, learns, and every part of it does."""

from typing import Any

import pytest
import torch

from tests.megatron.common.launch import run_scenarios

START: dict[str, Any] = {"perturb": False, "sinkhorn_iterations": 20}
START |= {"steps": 8, "optimizer": {"lr": 3e-3}}
GQA = {"num_query_groups": 2}
SWIGLU = {"gated_linear_unit": True, "add_bias_linear": False, "normalization": "RMSNorm"}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "gqa": {"config": GQA},
    "swiglu": {"config": SWIGLU},
    "moe": {"kind": "moe"},
    "mla": {"kind": "mla"},
    "block": {"kind": "block"},
}


def start_scenarios() -> dict[str, dict[str, Any]]:
    """Every kind of model, ordinary and with mHC, from the same weights."""
    scenarios: dict[str, dict[str, Any]] = {}
    for kind, settings in KINDS.items():
        scenarios[kind] = {**START, **settings, "steps": 1, "mhc": None}
        scenarios[f"{kind} mhc"] = {**START, **settings}
    scenarios["dense deepseek_v4"] = {**START, "steps": 1, "mhc": {"convention": "deepseek_v4"}}
    scenarios["dense deepseek_v4_1"] = {
        **START,
        "steps": 2,
        "mhc": {"convention": "deepseek_v4_1"},
    }
    scenarios["dense one stream"] = {**START, "steps": 1, "mhc": {"num_streams": 1}}
    scenarios["dense three streams"] = {**START, "steps": 1, "mhc": {"num_streams": 3}}
    scenarios["dense hc"] = {**START, "steps": 2, "mhc": {"variant": "hc"}}
    scenarios["dense zero"] = {**START, "steps": 1, "mhc": {"init": "zero"}}
    scenarios["dense eight"] = {**START, "mhc": None}
    return scenarios


# Weights that sum to one in fp32 over 8 sites, averaged over all tokens: none or a few units in the
# last place of a loss of 5, which are 9e-8 each
SAME_START = 3e-7


@pytest.mark.parametrize("kind", KINDS)
def test_mhc_starts_as_the_ordinary_model(kind: str) -> None:
    results = run_scenarios(1, start_scenarios())
    ordinary, wide = results[kind]["losses"][0], results[f"{kind} mhc"]["losses"][0]
    assert wide == pytest.approx(ordinary, rel=SAME_START)
    losses = results[f"{kind} mhc"]["losses"]
    # two batches in turn are on the way to being learnt by heart: 1.4 nats are seen, or more
    assert losses[-1] < losses[0] - 1, "it does not train"


@pytest.mark.parametrize("variant", ["one stream", "three streams", "hc"])
def test_other_settings_start_as_the_ordinary_model(variant: str) -> None:
    results = run_scenarios(1, start_scenarios())
    want = results["dense"]["losses"][0]
    assert results[f"dense {variant}"]["losses"][0] == pytest.approx(want, rel=SAME_START)


@pytest.mark.parametrize("convention", ["deepseek_v4", "deepseek_v4_1"])
def test_deepseeks_conventions_start_within_their_eps(convention: str) -> None:
    results = run_scenarios(1, start_scenarios())
    want = results["dense"]["losses"][0]
    # 1e-6 on each H_pre and on Sinkhorn's sums: norms take most of it back, 2e-7 is seen
    assert results[f"dense {convention}"]["losses"][0] == pytest.approx(want, rel=1e-6)


def test_the_start_of_zeros_is_another_function() -> None:
    """What the comparisons above would show if init=residual did nothing.

    Not much: H_pre is then 2 in sum, which a norm takes back but for its eps, and H_post is 1.
    """
    results = run_scenarios(1, start_scenarios())
    zero, ordinary = results["dense zero"]["losses"][0], results["dense"]["losses"][0]
    # 1e-5 is seen, ten times the widest bound above
    assert abs(zero - ordinary) > 5e-6 * ordinary


def test_mhc_moves_away_from_the_ordinary_model() -> None:
    results = run_scenarios(1, start_scenarios())
    ordinary, wide = results["dense eight"]["losses"], results["dense mhc"]["losses"]
    # 8 steps take them 1e-3 apart, where the first losses' rounding is 9e-8
    assert abs(wide[-1] - ordinary[-1]) > 3e-4 * ordinary[-1]
    moved = results["dense mhc"]["parameters"]
    start = results["dense one stream"]["parameters"]
    same = [k for k, v in start.items() if k in moved and torch.equal(v, moved[k])]
    assert not same, f"these parameters stayed as they were: {same}"


@pytest.mark.parametrize("variant", ["mhc", "hc", "deepseek_v4_1"])
def test_every_parameter_gets_a_gradient_from_the_second_step_on(variant: str) -> None:
    gradients = run_scenarios(1, start_scenarios())[f"dense {variant}"]["gradients"][1]
    assert len(gradients) == 8 * 3
    for name, gradient in gradients.items():
        rows = gradient
        if name.startswith("decoder.layers.0.attention_connection"):
            # the streams are still equal there, so no mixing of them matters
            rows = {
                "alpha": gradient[:2],
                "bias": gradient[:8],
                "phi": gradient[:8],
                "theta": gradient[:2],
            }[name.split(".")[-1]]
        flat = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(-1)
        empty = (flat.norm(dim=-1) == 0).nonzero().flatten().tolist()
        assert not empty, f"{name} has no gradient in rows {empty}"


def test_mhc_parameters_have_no_weight_decay() -> None:
    decay = run_scenarios(1, start_scenarios())["dense mhc"]["weight_decay"]
    ours = {name: value for name, value in decay.items() if "connection" in name}
    assert len(ours) == 24 and set(ours.values()) == {0.0}
    assert decay["decoder.layers.0.mlp.linear_fc1.weight"] == 1.0
