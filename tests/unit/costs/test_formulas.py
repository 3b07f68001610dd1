"""mHC's FLOPs and activation bytes, against counts from the equations and a measurement."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_mhc import MHCConfig
from megatron_mhc.costs.formulas import (
    activation_bytes_a_token,
    forward_flops_a_token,
    full_recompute_bytes_a_token,
    parameters_of,
)
from megatron_mhc.costs.sites import Sites
from megatron_mhc.model.connection import Head, HyperConnection


class Counter:
    """Counts the FLOPs of scalar products."""

    flops = 0

    def dot(self, a: list[float], b: list[float]) -> float:
        """sum(a * b): a multiplication and an addition an element."""
        assert len(a) == len(b)
        self.flops += 2 * len(a)
        return math.fsum(x * y for x, y in zip(a, b, strict=True))


def site(count: Counter, n: int, width: int, variant: str) -> None:
    """One site for one token, scalar by scalar, in the equations' own order (paper 4.1 to 4.3)."""
    x = [[0.1 * (j + c) for c in range(width)] for j in range(n)]
    v = [value for stream in x for value in stream]
    count.dot(v, v)
    if variant == "hc":  # theta_pre and theta_post one row each, theta_res one a stream written
        for _ in range(n + 2):
            for stream in x:
                count.dot([0.5] * width, stream)
    else:
        for _ in range(n * n + 2 * n):
            count.dot([0.5] * len(v), v)
    for c in range(width):
        column = [x[j][c] for j in range(n)]
        count.dot([0.25] * n, column)  # u
        for _ in range(n):  # y: row of H_res times the streams, and H_post's f
            count.dot([0.25] * n + [1.0], [*column, 0.3])


def head(count: Counter, n: int, width: int) -> None:
    """The learned end of a model, for one token."""
    v = [0.1] * (n * width)
    count.dot(v, v)
    for _ in range(n):
        count.dot([0.5] * len(v), v)
    for _ in range(width):
        count.dot([0.25] * n, [0.1] * n)


@pytest.mark.parametrize(
    ("settings", "learned", "mtp"),
    [
        ({}, False, 0),
        ({"num_streams": 2}, False, 1),
        ({"variant": "hc", "num_streams": 3}, False, 0),
        ({"convention": "deepseek_v4"}, True, 2),
        ({"convention": "deepseek_v4_1"}, False, 1),
    ],
)
def test_forward_flops_are_those_of_the_equations(settings: dict, learned: bool, mtp: int) -> None:
    mhc = MHCConfig(**settings)
    count, layers, width = Counter(), 3, 7
    for _ in range(2 * (layers + mtp)):
        site(count, mhc.num_streams, width, mhc.variant)
    for _ in range((1 + mtp) if learned else 0):
        head(count, mhc.num_streams, width)
    if mhc.end == "last_pre":
        for _ in range((1 + mtp) * width):
            count.dot([0.25] * mhc.num_streams, [0.1] * mhc.num_streams)
    assert forward_flops_a_token(mhc, Sites(2 * layers, 2, 1, mtp), width) == count.flops


def test_activation_bytes_are_those_measured_on_a_gpu() -> None:
    """`benchmarks/results/2026-11-26-projection.md`: 12.2 GiB ordinary, 17.2 with mHC, 8 layers."""
    a_token = activation_bytes_a_token(MHCConfig(), 16, 4096, 2)
    gib = a_token * 2 * 4096 / 2**30
    # both figures are rounded to 0.05
    assert gib == pytest.approx(17.2 - 12.2, abs=0.1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"convention": "deepseek_v4"}, {"convention": "deepseek_v4_1"}, {"variant": "hc"}],
)
def test_parameter_count_is_the_modules(settings: dict) -> None:
    mhc = MHCConfig(num_streams=3, **settings)
    modules = [HyperConnection(mhc, 10, site) for site in range(4)]
    modules += [Head(mhc, 10)] if mhc.learned_head else []
    count = sum(p.numel() for module in modules for p in module.parameters())
    assert parameters_of(mhc, Sites(4), hidden_size=10) == count


@pytest.mark.parametrize(
    ("method", "length", "inputs", "whole", "rebuilt"),
    [
        ("uniform", 1, 10, 0, 1),
        ("uniform", 4, 3, 0, 4),  # blocks of 4, 4 and 2 layers
        ("uniform", 16, 1, 0, 10),
        ("block", 4, 4, 6, 1),  # four layers by themselves, six as without recompute
        ("block", 16, 10, 0, 1),
    ],
)
def test_full_recompute_keeps_the_inputs_of_blocks(
    method: str, length: int, inputs: int, whole: int, rebuilt: int
) -> None:
    layer = activation_bytes_a_token(MHCConfig(), 2, 64, 2)
    kept = inputs * 3 * 2 * 64 + whole * layer
    found = full_recompute_bytes_a_token(MHCConfig(), 10, 64, 2, method, length)
    assert found == (kept, rebuilt * layer)


@pytest.mark.parametrize(
    ("settings", "sites", "built", "run"),
    [
        ({}, Sites(8, 2, 0, 0), 8, 8),
        ({"mtp_num_layers": 2}, Sites(8, 2, 2, 2), 12, 12),
        ({"mtp_num_layers": 2, "mtp_use_repeated_layer": True}, Sites(8, 2, 1, 2), 10, 12),
        ({"hybrid_layer_pattern": "M*-E"}, Sites(4), 4, 4),
        ({"hybrid_layer_pattern": "M-|M*-"}, Sites(5), 5, 5),
        (
            {"hybrid_layer_pattern": "M*|-/*E/*E", "mtp_num_layers": 2},
            Sites(3, 2, 2, 2),
            *(7, 7),
        ),
    ],
)
def test_sites_are_those_of_the_layers(
    settings: dict[str, Any], sites: Sites, built: int, run: int
) -> None:
    found = Sites.of(SimpleNamespace(**{"num_layers": 4, "mtp_num_layers": None} | settings))
    assert found == sites
    assert (found.built, found.run) == (built, run)
