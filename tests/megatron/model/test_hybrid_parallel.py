"""HybridModel over processes: every way to distribute it trains as one process does."""

from typing import Any

import pytest

from megatron_mhc.patches.supported_versions import is_installed
from tests.megatron.common.compare import assert_same_training
from tests.megatron.common.launch import run_scenarios
from tests.megatron.common.settings import (
    DELAYED,
    FULL_RECOMPUTE,
    HEAD,
    SGD,
    SUMMATION_ORDER,
    UNCLIPPED,
    VIRTUAL,
    stages,
)

PATTERN = "*-M*-"
SPLIT = "*-|M*-"
MOE: dict[str, Any] = {"pattern": "*E*-", "kind": "moe"}
# as in `test_schedules`: no sum of another order over stages, nothing fused across their bounds
EXACT: dict[str, Any] = {
    "pattern": PATTERN,
    "optimizer": UNCLIPPED,
    "tied": False,
    "fuse": "layer",
    "evaluate": True,
    "batch": 8,
    "microbatches": 4,
}
ROUNDED: dict[str, Any] = {"pattern": PATTERN, "optimizer": SGD}
TENSOR: dict[str, Any] = {"tensor_model_parallel_size": 2}
SEQUENCE: dict[str, Any] = {"parallel": TENSOR, "config": {"sequence_parallel": True}}
OVERLAPS = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "bucket_size": 5000,
}
MTP: dict[str, Any] = {"pattern": "*-*-/*-/*-", "config": {"mtp_num_layers": 2}}
# name: bound (None: bit for bit), settings of both runs, those of the two processes
CASES: dict[str, tuple[float | None, dict[str, Any], dict[str, Any]]] = {
    "two segments": (None, EXACT, {"pattern": SPLIT, "parallel": stages(2)}),
    "segments of one layer and of four": (
        None,
        EXACT,
        {"pattern": "*|-M*-", "parallel": stages(2)},
    ),
    "no segments named": (
        None,
        {**EXACT, "pattern": "*-*-"},
        {"parallel": stages(2)},
    ),
    "virtual segments": (
        None,
        EXACT,
        {"pattern": "*|-M|*|-", "parallel": VIRTUAL},
    ),
    "the loss alone": (None, EXACT, {"pattern": "*-M*-|", "parallel": stages(2)}),
    "the embedding alone": (None, EXACT, {"pattern": "|*-M*-", "parallel": stages(2)}),
    "the loss alone, overlap of messages": (
        None,
        EXACT,
        {"pattern": "*-M*-|", "parallel": stages(2), "mhc": {"overlap_p2p": True}},
    ),
    "learned head": (
        None,
        {**EXACT, "mhc": HEAD},
        {"pattern": SPLIT, "parallel": stages(2)},
    ),
    "delayed sites": (
        None,
        {**EXACT, "mhc": DELAYED},
        {"pattern": SPLIT, "parallel": stages(2)},
    ),
    "full recompute": (
        None,
        {**EXACT, "config": FULL_RECOMPUTE},
        {"pattern": SPLIT, "parallel": stages(2)},
    ),
    "streams recomputed": (
        None,
        {**EXACT, "mhc": {"recompute": 2}},
        {"pattern": SPLIT, "parallel": stages(2)},
    ),
    "overlap of messages": (
        None,
        EXACT,
        {"pattern": SPLIT, "parallel": stages(2), "mhc": {"overlap_p2p": True}},
    ),
    "overlap of messages, streams recomputed": (
        None,
        EXACT,
        {
            "pattern": SPLIT,
            "parallel": stages(2),
            "mhc": {"overlap_p2p": True, "overlap_in_flight": 2, "recompute": 1},
            "rebuild_ahead": True,
        },
    ),
    "overlap of messages, virtual segments": (
        None,
        EXACT,
        {"pattern": "*|-M|*|-", "parallel": VIRTUAL, "mhc": {"overlap_p2p": True}},
    ),
    "distributed optimizer with both overlaps": (
        None,
        {"pattern": PATTERN, "optimizer": UNCLIPPED},
        {"microbatches": 1, "ddp": OVERLAPS},
    ),
    "tensor parallel": (SUMMATION_ORDER, ROUNDED, {"parallel": TENSOR}),
    "sequence parallel": (SUMMATION_ORDER, {**ROUNDED, "pattern": "*-*-"}, SEQUENCE),
    "sequence parallel, learned head": (
        SUMMATION_ORDER,
        {**ROUNDED, "pattern": "-*-", "mhc": HEAD},
        SEQUENCE,
    ),
    "expert parallel": (
        SUMMATION_ORDER,
        {**ROUNDED, **MOE},
        {"microbatches": 1, "parallel": {"expert_model_parallel_size": 2}},
    ),
    "multi-token prediction": (
        SUMMATION_ORDER,
        {**MTP, "optimizer": SGD, "batch": 8, "microbatches": 4, "tied": False},
        {"pattern": "*-|*-/*-/*-", "parallel": stages(2)},
    ),
}
if is_installed("<0.19"):
    del CASES["multi-token prediction"]  # refused there


def results(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a case trains in two processes, and in one."""
    split = {name: {**both, **two} for name, (_, both, two) in CASES.items()}
    alone = {name: both for name, (_, both, _) in CASES.items()}
    return run_scenarios(2, split)[case], run_scenarios(1, alone)[case]


@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_in_one_process(case: str) -> None:
    got, want = results(case)
    assert_same_training(got, want, bound=CASES[case][0])
    assert want["losses"][0] != want["losses"][1]
