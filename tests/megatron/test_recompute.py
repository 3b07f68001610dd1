"""Selective recompute of the streams: bit for bit the training without it, in less memory."""

from typing import Any

import pytest

from tests.megatron.launch import assert_same_training, run_scenarios

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def selective(*modules: str) -> dict[str, Any]:
    """Megatron's own recompute of parts of a layer."""
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def stages(size: int, **more: int) -> dict[str, int]:
    """Arguments of initialize_model_parallel for so many stages."""
    return {"pipeline_model_parallel_size": size, **more}


LONG = {"microbatches": 4, "batch": 8, "tied": False}
# four layers: blocks of one, of two, of three and a rest of one, of all, and the best number
CASES: dict[str, tuple[int, int | str, dict[str, Any]]] = {
    "one layer": (1, 1, {"microbatches": 4}),
    "two layers": (1, 2, {}),
    "three layers and one": (1, 3, {"config": DROPOUT}),
    "more than there are": (1, 9, {}),
    "auto": (1, "auto", {}),
    "moe": (1, 2, {"kind": "moe"}),
    "mla": (1, 2, {"kind": "mla"}),
    "learned head": (1, 2, {"mhc": {"convention": "deepseek_v4"}}),
    "boundaries apart": (1, 2, {"fuse": "none"}),
    "RMSNorm": (1, 2, {"config": {"normalization": "RMSNorm", "add_bias_linear": False}}),
    "bf16": (1, 2, {"bf16": True}),
    "evaluation between": (1, 2, {"evaluate_between": True}),
    "rebuilt ahead": (1, 2, {"rebuild_ahead": True}),
    "interrupted forward": (1, 2, {"interrupt": "forward"}),
    "interrupted backward": (1, 2, {"interrupt": "backward"}),
    "core_attn": (1, 2, {"config": {**DROPOUT, **selective("core_attn")}}),
    "mlp": (1, 2, {"config": {**DROPOUT, **selective("core_attn", "mlp")}}),
    "moe recomputed": (1, 2, {"kind": "moe", "config": selective("moe")}),
    "1F1B": (2, 1, {**LONG, "parallel": stages(2)}),
    "1F1B, auto, ahead": (2, "auto", {**LONG, "parallel": stages(2), "rebuild_ahead": True}),
    "interleaved": (
        2,
        1,
        {**LONG, "parallel": stages(2, virtual_pipeline_model_parallel_size=2)},
    ),
    "interleaved, two layers a chunk": (
        2,
        2,
        {
            **LONG,
            "config": {"num_layers": 8},
            "parallel": stages(2, virtual_pipeline_model_parallel_size=2),
            "rebuild_ahead": True,
        },
    ),
    "sequence parallel": (
        2,
        2,
        {
            "config": {"sequence_parallel": True},
            "parallel": {"tensor_model_parallel_size": 2},
        },
    ),
    "distributed optimizer": (
        2,
        2,
        {
            "ddp": {
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
                "bucket_size": 5000,
            }
        },
    ),
    "expert parallel": (
        2,
        2,
        {"kind": "moe", "parallel": {"expert_model_parallel_size": 2}},
    ),
}


def results(size: int) -> dict[str, dict[str, Any]]:
    """Every case of so many processes, with recompute and ("..., whole") without."""
    scenarios: dict[str, dict[str, Any]] = {}
    for name, (processes, recompute, settings) in CASES.items():
        if processes != size:
            continue
        on = {**settings, "steps": 2, "hold": size == 1}
        off = {**on, "interrupt": False}
        scenarios[name] = {**on, "mhc": {**settings.get("mhc", {}), "recompute": recompute}}
        scenarios[f"{name}, whole"] = off
    return run_scenarios(size, scenarios)


@pytest.mark.parametrize("case", CASES)
def test_trains_as_without_bit_for_bit(case: str) -> None:
    size = CASES[case][0]
    got, want = results(size)[case], results(size)[f"{case}, whole"]
    assert_same_training(got, want, bound=None)
    for step, (mine, theirs) in enumerate(zip(got["gradients"], want["gradients"], strict=True)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].equal(theirs[name]), f"{name} of step {step}"


def test_no_sublayer_runs_again() -> None:
    for name, result in results(1).items():
        assert set(result["calls"].values()) == {2.0 if "evaluation" in name else 1.0}, name
