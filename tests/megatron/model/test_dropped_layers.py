"""A built model whose layers are dropped trains as one that was built without them."""

from typing import Any

import pytest

from tests.megatron.common.compare import assert_same_training
from tests.megatron.common.launch import run_scenarios

DROPPED: dict[str, list[int]] = {"first": [0], "last": [3], "middle": [1], "both ends": [0, 3]}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "delayed sites": {"mhc": {"convention": "deepseek_v4_1"}},
    "delayed sites, blocks of 2": {"mhc": {"convention": "deepseek_v4_1", "recompute": 2}},
    "blocks of 1": {"mhc": {"recompute": 1}},
    "blocks of 2": {"mhc": {"recompute": 2}},
    "full recompute": {
        "config": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    },
}
HEAD = {"mhc": {"convention": "deepseek_v4"}}
PIPELINE = {"parallel": {"pipeline_model_parallel_size": 2}}
OVERLAP = {**PIPELINE, "mhc": {"overlap_p2p": True}}


def short(settings: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same scenario, built with so many layers."""
    return {**settings, "config": {**settings.get("config", {}), "num_layers": layers}}


def single() -> dict[str, dict[str, Any]]:
    """All that one process trains."""
    kinds = {**KINDS, "head": HEAD}
    built = {f"{kind}, {n}": short(kinds[kind], n) for kind in kinds for n in (2, 3)}
    dropped = {
        f"{kind}, {name}": {**kinds[kind], "drop": drop}
        for kind in kinds
        for name, drop in DROPPED.items()
        if kind != "head" or 3 not in drop
    }
    return built | dropped


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_shortened_model_trains_as_a_short_one(kind: str, name: str) -> None:
    results = run_scenarios(1, single())
    got, want = results[f"{kind}, {name}"], results[f"{kind}, {4 - len(DROPPED[name])}"]
    assert_same_training(got, want, bound=None)
    assert got["losses"][-1] != got["losses"][0]
    # what a site leaves is taken by the next one that is there, and by nobody else
    assert got["calls"] == want["calls"] and got["linked"] == want["linked"]


@pytest.mark.parametrize("name", ["first", "middle"])
def test_a_learned_head_stays_with_the_last_layer(name: str) -> None:
    results = run_scenarios(1, single())
    assert_same_training(results[f"head, {name}"], results["head, 3"], bound=None)


def test_a_dropped_head_is_refused() -> None:
    with pytest.raises(AssertionError, match="has no learned head, with which"):
        run_scenarios(1, {"bad": {**HEAD, "drop": [3]}})


@pytest.mark.parametrize("kind", ["stock", "overlap"])
def test_stages_of_a_pipeline_are_shortened_too(kind: str) -> None:
    """The first stage's first layer and the last one's last: the middle still exchanges streams."""
    settings = {"stock": PIPELINE, "overlap": OVERLAP}[kind]
    results = run_scenarios(2, {"dropped": {**settings, "drop": [0, 3]}, "2": short(settings, 2)})
    assert_same_training(results["dropped"], results["2"], bound=None)
