"""Layers under a checkpoint that the configuration did not have when they were built.

The next site's `pre`, computed on one side of a checkpoint's edge, must not be read on the other:
its gradient would be lost. Each model trains bit for bit as one whose layers share nothing.
"""

from typing import Any

import pytest

from tests.megatron.common.compare import assert_same_training
from tests.megatron.common.launch import run_scenarios
from tests.megatron.common.settings import DELAYED

KINDS = ("full", "reentrant", "non-reentrant")
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"kind": "moe"},
    "hc": {"mhc": {"variant": "hc"}},
    "recompute": {"mhc": {"recompute": 1}},
    "evaluation between": {"evaluate_between": True},
}


def results() -> dict[str, dict[str, Any]]:
    scenarios: dict[str, dict[str, Any]] = {}
    for name, settings in SETTINGS.items():
        scenarios[name] = {**settings, "fuse": "layer"}
        for kind in KINDS:
            scenarios[f"{name}, {kind}"] = {**settings, "checkpoint": kind}
    return run_scenarios(1, scenarios)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_around_some_layers_changes_no_bit(name: str, kind: str) -> None:
    trained = results()
    assert_same_training(trained[f"{name}, {kind}"], trained[name], bound=None)


@pytest.mark.parametrize("kind", KINDS)
def test_delayed_sites_refuse_it(kind: str) -> None:
    """What crosses the edge has no H_pre behind it, and reading cannot begin anew."""
    with pytest.raises(AssertionError, match="a delayed site got streams alone"):
        run_scenarios(1, {"bad": {"mhc": DELAYED, "checkpoint": kind}})
