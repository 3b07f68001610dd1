"""Offloading of whole layers (`cpu_offloading`), but for the copies: `common.offloading`."""

from typing import Any

import pytest

from tests.megatron.common.compare import assert_same_training
from tests.megatron.common.launch import run_scenarios

OFFLOADED = {"config": {"cpu_offloading": True, "cpu_offloading_num_layers": 2}}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "own norm": {"kind": "own norm"},
    "experts": {"kind": "moe"},
    "learned head": {"mhc": {"convention": "deepseek_v4"}},
    "delayed sites": {"mhc": {"convention": "deepseek_v4_1"}},
    "hc": {"mhc": {"variant": "hc"}},
    "ordinary": {"mhc": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_finds_what_it_saved_in_its_own_turn(kind: str) -> None:
    scenarios: dict[str, dict[str, Any]] = {}
    for name, settings in KINDS.items():
        # a site's input is computed in another operation where layers are fused
        scenarios[name] = {"fuse": "layer", **settings}
        scenarios[f"{name}, offloaded"] = {**settings, **OFFLOADED}
    results = run_scenarios(1, scenarios)
    got, want = results[f"{kind}, offloaded"], results[kind]
    assert_same_training(got, want, bound=None)
    assert got["linked"] == [False] * len(want["linked"])
    assert got["offloaded"] > want["offloaded"]
