"""Blocks of selective recompute: the least memory, by a search of its own over whole layers."""

import math

import pytest
import torch

from megatron_mhc import MHCConfig
from megatron_mhc.costs.recompute_plan import Plan, microbatches_in_flight
from megatron_mhc.kernels.backend import Backend
from megatron_mhc.start.banner import banner


def least(n: int, layers: int, in_flight: int, norms: int) -> int:
    """math.md's formula, sites and all, minimised over whole layers (two sites each)."""
    w, sites = 1 + norms / 2, 2 * layers

    def memory(count: int) -> float:
        block = 2 * count
        return in_flight * n * math.ceil(sites / block) + (n + w) * block

    return min(range(1, layers + 1), key=memory)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("norms", [0, 2])
def test_auto_is_the_least_memory(n: int, norms: int) -> None:
    seen = set()
    for layers in range(1, 41):
        for in_flight in (1, 2, 4, 8, 16):
            plan = Plan(n, 64, (layers,), in_flight, norms, "auto")
            want = least(n, layers, in_flight, norms)
            seen.add(want)
            assert plan.layers == want, (layers, in_flight)
    assert len(seen) > 3


def test_more_microbatches_want_longer_blocks() -> None:
    lengths = [Plan(4, 64, (32,), m, 2, "auto").layers for m in (1, 4, 16)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_microbatches_in_flight() -> None:
    assert [microbatches_in_flight(stage, 4) for stage in range(4)] == [4, 3, 2, 1]
    assert microbatches_in_flight(0, 1) == 1
    # Megatron's warm-up of the interleaved schedule, and the one that then goes forward
    assert [microbatches_in_flight(stage, 2, 2, 2) for stage in range(2)] == [5, 3]
    # two for each stage behind: `test_overlap.py` counts them
    assert [microbatches_in_flight(stage, 4, ahead=2) for stage in range(4)] == [7, 5, 3, 1]


def test_bytes_a_token_by_hand() -> None:
    # 8 layers, one in flight, Transformer Engine's norms: blocks of two layers
    terms = Plan(4, 4096, (8,), 1, 0, 2).bytes_a_token
    stream = 2 * 4096
    assert terms == {
        "block starts": 4 * 4 * stream,
        "rebuilt block": (4 + 1) * 4 * stream,
        "F's outputs": 16 * stream,
        "coefficients": 16 * 4 * (24 + 1 + 4 + 4 + 16),
        "ordinary residual and norm": -16 * stream,
    }
    # two chunks of four layers, three of them in flight
    chunks = Plan(4, 4096, (4, 4), 3, 2, 2).bytes_a_token
    assert chunks["block starts"] == 3 * 4 * 2 * stream
    assert chunks["rebuilt block"] == (4 + 2) * 4 * stream
    assert chunks["F's outputs"] == 3 * 8 * stream


def test_the_banner_says_how() -> None:
    plan = Plan(4, 4096, (8,), 1, 0, "auto")
    triton = MHCConfig(recompute="auto", backend="triton")
    where = (torch.device("cpu"), torch.bfloat16)
    line = banner(triton, "flags", 16, 10, *where, plan)
    assert f"recompute in blocks of {plan.layers} layers (auto): " in line
    assert f"{sum(plan.bytes_a_token.values()):,.0f} bytes a token" in line
    assert "(auto)" not in str(Plan(4, 4096, (8,), 3, 0, 1)) and "1 layer: " in str(
        Plan(4, 4096, (8,), 3, 0, 1)
    )
    assert "; recompute auto (settings" in banner(triton, "environment", 16, 10, *where)
    assert "recompute" not in banner(MHCConfig(), "flags", 16, 10, *where)


def test_the_banner_names_the_backend() -> None:
    pytest.importorskip("triton")
    hc = MHCConfig(variant="hc")
    line = banner(hc, "flags", 16, 10, torch.device("cuda"), torch.bfloat16)
    assert "variant hc, " in line and "backend triton; 16 sites" in line
    line = banner(hc, "flags", 16, 10, torch.device("cpu"), torch.bfloat16)
    assert "backend torch, because Triton needs a CUDA device" in line
    line = banner(MHCConfig(), "flags", 16, 10, torch.device("cuda"), torch.bfloat16)
    assert "backend triton; 16 sites" in line


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_banner_promises_no_bytes_for_the_reference(backend: Backend) -> None:
    """What it says of either dtype, `test_recompute.py` counts in bytes."""
    mhc, cpu = MHCConfig(recompute=2, backend=backend), torch.device("cpu")
    plan = Plan(4, 4096, (8,), 1, 0, 2)
    for followed, blocks in ((plan, "recompute in blocks of 2 layers"), (None, "recompute 2")):
        line = banner(mhc, "flags", 16, 10, cpu, torch.bfloat16, followed)
        assert (
            f"{blocks} gives no streams back: backend torch keeps fp32 copies of torch.bfloat16"
            " streams (settings"
        ) in line
        line = banner(mhc, "flags", 16, 10, cpu, torch.float32, followed)
        assert f"{blocks} (what it saves is predicted for backend triton alone) (settings" in line
