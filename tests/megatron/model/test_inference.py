"""Megatron's static inference engine writes what whole forwards of the model would."""

from typing import Any

import pytest

from tests.megatron.common.launch import run_scenarios

COMMON: dict[str, Any] = {"generate": True, "steps": 6}
CASES: dict[str, dict[str, Any]] = {
    "ordinary": {"mhc": None},
    "mhc": {},
    "hc": {"mhc": {"variant": "hc"}},
    "deepseek_v4": {"mhc": {"convention": "deepseek_v4"}},
    "deepseek_v4_1": {"mhc": {"convention": "deepseek_v4_1"}},
    "recompute": {"mhc": {"recompute": 1}},
    "one layer": {"config": {"num_layers": 1}},
    "moe": {"kind": "moe"},
    "mla": {"kind": "mla"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_static_engine_writes_what_the_model_would(case: str) -> None:
    scenarios = {name: {**COMMON, **settings} for name, settings in CASES.items()}
    texts = run_scenarios(1, scenarios)[case]["generated"]
    assert texts["engine"] == texts["forward"]
    assert all(len(text) == 8 for text in texts["engine"])
