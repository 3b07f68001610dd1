"""The metrics against float64 from streams and parameters; the same over every parallelism."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mhc.kernels import reference
from megatron_mhc.metrics.formulas import gains, residual_metrics, stream_geometry
from megatron_mhc.patches.supported_versions import is_installed
from tests.megatron.common.compare import assert_same_training
from tests.megatron.common.launch import run_scenarios
from tests.megatron.common.settings import DELAYED, FULL_RECOMPUTE, VIRTUAL, stages

ALONE: dict[str, dict[str, Any]] = {
    "mhc": {},
    "unrecorded": {"log": False},
    "no boundary fused": {"fuse": "none"},
    "no boundary fused across layers": {"fuse": "layer"},
    "full recompute": {"config": FULL_RECOMPUTE},
    "streams recomputed": {"mhc": {"recompute": 2}},
    "hc": {"mhc": {"variant": "hc"}},
    "deepseek_v4": {"mhc": {"convention": "deepseek_v4"}},
    "deepseek_v4_1": {"mhc": DELAYED},
    "deepseek_v4_1, full recompute": {"mhc": DELAYED, "config": FULL_RECOMPUTE},
    "two streams": {"mhc": {"num_streams": 2, "init": "zero"}},
    "hybrid": {"pattern": "*-*-*-*-"},  # the same layers
}
if not is_installed("<0.19"):  # where multi-token prediction is refused
    # its layers are no part of the depth; Megatron tells those of attention alone what they are
    ALONE["hybrid, multi-token prediction"] = {
        "pattern": "*-*-*-*-/-*",
        "config": {"mtp_num_layers": 1},
    }
SHARDED = {"use_distributed_optimizer": True}
TWO: dict[str, dict[str, Any]] = {
    "two stages": {"parallel": stages(2)},
    "two stages, hc": {
        "parallel": stages(2),
        "mhc": {"variant": "hc"},
    },
    "two stages, full recompute": {
        "parallel": stages(2),
        "config": FULL_RECOMPUTE,
    },
    "two stages, streams recomputed": {
        "parallel": stages(2),
        "mhc": {"recompute": 1},
    },
    "two stages, deepseek_v4_1": {"parallel": stages(2), "mhc": DELAYED},
    "the loss on a stage of its own": {
        "parallel": stages(2),
        "config": {"pipeline_model_parallel_layout": "Etttt|L"},
    },
    "the embedding on a stage of its own": {
        "parallel": stages(2),
        "config": {"pipeline_model_parallel_layout": "E|ttttL"},
    },
    "two interleaved stages": {
        "parallel": VIRTUAL,
    },
    "two segments of a hybrid model": {
        "pattern": "*-*-*|-*-",
        "parallel": stages(2),
    },
    "data parallel": {},
    "distributed optimizer": {"ddp": SHARDED},
    "distributed optimizer, overlaps": {
        "ddp": {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
    },
    "sequence parallel": {
        "parallel": {"tensor_model_parallel_size": 2},
        "config": {"sequence_parallel": True},
    },
}


def train(processes: int, scenarios: dict[str, Any]) -> dict[str, Any]:
    """Two steps of every scenario, recorded (`metrics.worker.run`)."""
    settings = {
        name: {"sinkhorn_iterations": 20, **scenario} for name, scenario in scenarios.items()
    }
    return run_scenarios(processes, settings, "metrics.worker")


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return train(1, ALONE)


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    return train(2, TWO)


def amax_gains(m: np.ndarray) -> tuple[float, float]:
    """One matrix (dst, src), as the paper's section 3.1 has it."""
    n = len(m)
    rows = [abs(sum(m[i, j] for j in range(n))) for i in range(n)]
    columns = [abs(sum(m[i, j] for i in range(n))) for j in range(n)]
    return max(rows), max(columns)


def truth_of(result: dict[str, Any], mhc: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """The last step's metrics in float64, token by token where a token's maps are multiplied."""
    truth = result["truth"]
    eps = {"pre_eps": 1e-6, "sinkhorn_eps": 1e-6} if "convention" in mhc else {}
    if mhc.get("convention") == DELAYED["convention"]:
        eps["norm_eps"] = 1e-20
    sites: dict[str, list[Any]] = {}
    maps = []
    for site in sorted(truth):
        one = truth[site][0]
        x = torch.cat([rank["x"] for rank in truth[site]])
        if "theta" in one:
            parameters = (one["theta"], one["alpha"], one["bias"])
            h_pre, h_post, h_res = reference.hc_coefficients(x, *parameters)
        else:
            parameters = (one["phi"], one["alpha"], one["bias"])
            h_pre, h_post, h_res = reference.coefficients(x, *parameters, **eps)
        m, streams = h_res.numpy(), x.numpy()
        maps.append(m)
        n = m.shape[-1]
        size = np.abs(m) / np.abs(m).sum(-1, keepdims=True)
        norms = np.sqrt((streams**2).sum(-1))
        cosine = [
            (streams[:, i] * streams[:, j]).sum(-1) / (norms[:, i] * norms[:, j])
            for i in range(n)
            for j in range(i)
        ]
        single = np.array([amax_gains(token) for token in m])
        for name, value in {
            "gain_forward_mean": single[:, 0].mean(),
            "gain_forward_max": single[:, 0].max(),
            "gain_backward_mean": single[:, 1].mean(),
            "gain_backward_max": single[:, 1].max(),
            "to_identity": np.sqrt(((m - np.eye(n)) ** 2).sum((-2, -1))).mean(),
            "to_uniform": np.sqrt(((m - 1 / n) ** 2).sum((-2, -1))).mean(),
            "entropy": -(size * np.log(size)).sum(-1).mean(),
            "row_error": np.abs(m.sum(-1) - 1).max(),
            "column_error": np.abs(m.sum(-2) - 1).max(),
            "h_pre": h_pre.mean(0).tolist(),
            "h_post": h_post.mean(0).tolist(),
            "stream_norm": norms.mean(0).tolist(),
            "stream_cosine": np.mean(cosine),
            "gradient_norm": one["gradient"].norm().item(),
        }.items():
            sites.setdefault(name, []).append(value)
    for name, order, column in (("forward", 1, 0), ("backward", -1, 1)):
        found = []
        for token in range(len(maps[0])):
            product, row = np.eye(maps[0].shape[-1]), []
            for m in maps[::order]:
                product = m[token] @ product if order == 1 else product @ m[token]
                row.append(amax_gains(product)[column])
            found.append(row[::order])
        sites[f"depth_gain_{name}_mean"] = np.mean(found, 0).tolist()
        sites[f"depth_gain_{name}_max"] = np.max(found, 0).tolist()
    return sites, np.stack([m.mean(0) for m in maps])


def assert_close(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Every number of one summary is another's, to fp32's rounding (2**-24) in sums of hundreds."""
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=2e-6, err_msg=name)


FLOAT64 = [("alone", n) for n in ALONE if n != "unrecorded" and "boundary" not in n]
FLOAT64 += [("two", n) for n in TWO if "optimizer" not in n]


@pytest.mark.parametrize(("processes", "name"), FLOAT64)
def test_metrics_equal_float64(processes: str, name: str, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(processes)[name]
    scenario = {**ALONE, **TWO}[name]
    sites, h_res = truth_of(result, scenario.get("mhc", {}))
    metrics = result["metrics"][-1]
    assert metrics["sites"] == list(range(8))
    assert_close(metrics["site"], sites)
    np.testing.assert_allclose(metrics["h_res"], h_res, rtol=2e-5, atol=2e-6)
    named = result["gradients"][-1].items()
    others = [g for name, g in named if ".head." in name or name.startswith("mtp.")]
    squares = sum(g**2 for g in sites["gradient_norm"])
    squares += sum(g.double().square().sum().item() for g in others)
    # the squares of the same fp32 gradients, added in float64 (1e-16) both times
    assert metrics["gradient_norm"] == pytest.approx(math.sqrt(squares), rel=1e-12)
    # what the comparison would miss if the model stood at its start: maps that do nothing
    assert min(sites["to_identity"]) > 0.01 and min(sites["gradient_norm"]) > 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "no boundary fused",
        "no boundary fused across layers",
        "full recompute",
        "streams recomputed",
        "hybrid",
    ],
)
def test_metrics_know_neither_fusion_nor_recompute_nor_how_many_sites_a_layer_has(
    alone: dict[str, Any], name: str
) -> None:
    assert alone[name]["metrics"] == alone["mhc"]["metrics"]


OF_ANOTHER = ("two stages, hc", "two stages, deepseek_v4_1")


@pytest.mark.parametrize("name", [n for n in TWO if n not in OF_ANOTHER])
def test_metrics_are_those_of_one_process(
    alone: dict[str, Any], two: dict[str, Any], name: str
) -> None:
    for got, want in zip(two[name]["metrics"], alone["mhc"]["metrics"], strict=True):
        assert_close(got["site"], want["site"])
        # fp32 gradients of tokens that are added in another order: 1.3e-7 is seen
        assert got["gradient_norm"] == pytest.approx(want["gradient_norm"], rel=1e-6)


def test_recording_changes_no_bit_of_training(alone: dict[str, Any]) -> None:
    assert_same_training(alone["mhc"], alone["unrecorded"], bound=None)


def test_the_gain_is_of_sums_with_their_signs() -> None:
    """Variant hc may have them: the infinity norm of this one is 5."""
    forward, backward = gains(torch.tensor([[2.0, -3.0], [0.5, 0.25]]))
    assert (forward.item(), backward.item()) == (1.0, 2.75)


def test_known_maps() -> None:
    """A map that doubles, one that permutes, one that averages: gains and distances by hand."""
    double, swap = 2 * torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    means, maxima = residual_metrics(torch.stack([double, swap, torch.full((2, 2), 0.5)])[:, None])
    assert means["gain_forward_mean"].tolist() == [2, 1, 1]
    assert means["depth_gain_forward_mean"].tolist() == [2, 2, 2]
    assert maxima["depth_gain_backward_max"].tolist() == [2, 1, 1]
    assert maxima["row_error"].tolist() == [1, 0, 0]
    assert means["to_identity"].tolist() == pytest.approx([math.sqrt(2), 2, 1])
    assert means["to_uniform"].tolist() == pytest.approx([math.sqrt(5), 1, 0])
    assert means["entropy"].tolist() == pytest.approx([0, 0, math.log(2)])


def test_one_stream_has_no_pair() -> None:
    norms, cosine = stream_geometry(torch.ones(3, 1, 4))
    assert norms.tolist() == [2.0] and cosine.item() == 1.0
