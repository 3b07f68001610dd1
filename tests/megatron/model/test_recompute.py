"""Selective recompute of the streams: bit for bit the training without it, in less memory."""

import json
from typing import Any

import pytest

from tests.megatron.common.cases import beside, parameters
from tests.megatron.common.compare import assert_same_training
from tests.megatron.common.launch import run_scenarios
from tests.megatron.common.settings import DELAYED, VIRTUAL, stages

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def selective(*modules: str) -> dict[str, Any]:
    """Megatron's own recompute of parts of a layer."""
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


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
    "delayed sites": (1, 2, {"mhc": DELAYED}),
    "delayed sites, moe, bf16": (1, 3, {"mhc": DELAYED, "kind": "moe", "bf16": True}),
    "RMSNorm": (1, 2, {"config": {"normalization": "RMSNorm", "add_bias_linear": False}}),
    "bf16": (1, 2, {"bf16": True}),
    "evaluation between": (1, 2, {"evaluate_between": True}),
    "rebuilt ahead": (1, 2, {"rebuild_ahead": True}),
    "interrupted forward": (1, 2, {"interrupt": "forward"}),
    "interrupted backward": (1, 2, {"interrupt": "backward"}),
    "core_attn": (1, 2, {"config": {**DROPOUT, **selective("core_attn")}}),
    # without biases: Megatron's checkpoint around an MLP returns its bias, and never ends
    "mlp": (
        1,
        2,
        {"config": {**DROPOUT, **selective("core_attn", "mlp"), "add_bias_linear": False}},
    ),
    "moe recomputed": (1, 2, {"kind": "moe", "config": selective("moe")}),
    "hybrid": (1, 3, {"pattern": "*-*-*"}),
    "hybrid, auto": (1, "auto", {"pattern": "*-ME*-", "kind": "moe", "config": DROPOUT}),
    "1F1B": (2, 1, {**LONG, "parallel": stages(2)}),
    "1F1B, delayed sites": (2, 1, {**LONG, "parallel": stages(2), "mhc": DELAYED}),
    "interleaved, delayed sites": (2, 1, {**LONG, "parallel": VIRTUAL, "mhc": DELAYED}),
    "1F1B, auto, ahead": (2, "auto", {**LONG, "parallel": stages(2), "rebuild_ahead": True}),
    "interleaved": (
        2,
        1,
        {**LONG, "parallel": VIRTUAL},
    ),
    "interleaved, two layers a chunk": (
        2,
        2,
        {
            **LONG,
            "config": {"num_layers": 8},
            "parallel": VIRTUAL,
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
    "sequence parallel, delayed sites": (
        2,
        2,
        {
            "config": {"sequence_parallel": True},
            "parallel": {"tensor_model_parallel_size": 2},
            "mhc": DELAYED,
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
THOROUGH = (
    "delayed sites, moe, bf16",
    "1F1B, delayed sites",
    "interleaved, two layers a chunk",
    "sequence parallel, delayed sites",
)


def whole(settings: dict[str, Any]) -> dict[str, Any]:
    """The same training without recompute, and without what only recompute could notice."""
    kept = {k: v for k, v in settings.items() if k not in ("interrupt", "rebuild_ahead")}
    return {**kept, "steps": 2}


def results(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a case trains with recompute and without; all of a size in one torchrun."""
    size = CASES[case][0]
    scenarios: dict[str, dict[str, Any]] = {}
    for name in beside(case, CASES, THOROUGH):
        processes, recompute, settings = CASES[name]
        if processes == size:
            common = {**whole(settings), "hold": size == 1}
            mhc = {**settings.get("mhc", {}), "recompute": recompute}
            scenarios[name] = {**common, **settings, "mhc": mhc}
            # many cases share one
            scenarios[f"whole {json.dumps(common, sort_keys=True)}"] = common
    done = run_scenarios(size, scenarios)
    alone = {**whole(CASES[case][2]), "hold": size == 1}
    return done[case], done[f"whole {json.dumps(alone, sort_keys=True)}"]


@pytest.mark.parametrize("case", parameters(CASES, THOROUGH))
def test_trains_as_without_bit_for_bit(case: str) -> None:
    got, want = results(case)
    assert_same_training(got, want, bound=None)
    for step, (mine, theirs) in enumerate(zip(got["gradients"], want["gradients"], strict=True)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].equal(theirs[name]), f"{name} of step {step}"


INTERRUPTED = {"interrupt": "forward", "steps": 1}
LEFT: dict[str, dict[str, Any]] = {
    "kept": INTERRUPTED,
    "boundaries apart": {**INTERRUPTED, "fuse": "none"},
    "recomputed": {**INTERRUPTED, "mhc": {"recompute": 2}},
    "in a block of its own": {**INTERRUPTED, "mhc": {"recompute": 1}},
}


@pytest.mark.parametrize("case", LEFT)
def test_a_forward_that_an_exception_ends_leaves_no_graph(case: str) -> None:
    assert run_scenarios(1, LEFT)[case]["left"] == 0


def test_no_streams_are_read_twice() -> None:
    """The sites' operations run once: what the backward does is a rebuild."""
    for name in beside("one layer", CASES, THOROUGH):
        if CASES[name][0] == 1:
            evaluated = name == "evaluation between"
            assert set(results(name)[0]["calls"].values()) == {2.0 if evaluated else 1.0}, name


TOKENS = 2 * 32  # of a microbatch
FP32 = 4 * 64  # bytes of C a token
N = 4


@pytest.mark.parametrize(
    ("case", "blocks", "last_layers"),
    [
        ("two layers", (2, 2), 2),
        ("three layers and one", (3, 1), 1),
        ("more than there are", (4,), 4),
        ("RMSNorm", (2, 2), 2),
        ("moe", (2, 2), 2),
        ("boundaries apart", (2, 2), 2),
        ("hybrid", (3, 2), 2),
        ("delayed sites", (2, 2), 2),
    ],
)
def test_the_bytes_are_gone(case: str, blocks: tuple[int, ...], last_layers: int) -> None:
    """What a forward keeps, counted storage by storage, falls by x, u and norm(u) of each block."""
    got, want = (result["held"] for result in results(case))

    def dropped(layers: int) -> int:
        sites = layers if "pattern" in CASES[case][2] else 2 * layers
        return ((sites - 1) * N + 2 * sites) * FP32 * TOKENS

    # what recompute keeps beside what the graph keeps anyway (h_pre) is no tensor of the graph's
    assert want["kept"] - got["kept"] == sum(map(dropped, blocks))
    assert got["ahead"] - got["kept"] == dropped(last_layers)
    assert got["whole"] == want["kept"] == want["whole"]


def test_the_reference_keeps_bf16_streams() -> None:
    """Its fp32 copies are the graph's: u and norm(u) of the four layers fall alone."""
    got, want = (result["held"] for result in results("bf16"))
    bf16 = FP32 // 2
    assert want["kept"] - got["kept"] == 4 * 2 * 2 * bf16 * TOKENS


def test_evaluation_keeps_no_streams() -> None:
    """Megatron turns gradients on around the residual slot; under no_grad there is no graph."""
    for result in results("two layers"):
        assert result["held"]["evaluation"] == 0
