"""Conventions against their models' own public code, where a package has it, in float64."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_mhc import MHCConfig
from megatron_mhc.kernels import reference

from .models_code import SITES, in_float64, recorded, rolled
from .test_conventions import EXACT, ITERATIONS, RMS, WIDTH, N, head, options, ours, site


def models_code(model: str) -> Any:
    """The file of transformers that has a model's code."""
    return pytest.importorskip(
        f"transformers.models.{model}.modeling_{model}", reason="transformers is not installed"
    )


@pytest.mark.parametrize("scale", RMS)
@pytest.mark.parametrize(
    ("name", "model", "prefix", "norm_eps"),
    [
        ("deepseek_v4", "deepseek_v4", "DeepseekV4", 1e-6),
        ("glm_5_3", "glm5_next", "Glm5NextText", 1e-5),
    ],
)
def test_transformers_has_the_same_sites_and_end(
    name: str,
    model: str,
    prefix: str,
    norm_eps: float,
    scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = models_code(model)
    # what casts to fp32 there casts to float64 here
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = SimpleNamespace(
        hc_mult=N,
        hc_sinkhorn_iters=ITERATIONS,
        hc_eps=1e-6,
        rms_norm_eps=norm_eps,
        hidden_size=WIDTH,
    )
    p = site(scale)
    module = in_float64(getattr(theirs, f"{prefix}HyperConnection")(config), p)
    post, comb, collapsed = module(p["x"][None])
    y = post.unsqueeze(-1) * p["f"].unsqueeze(-2) + comb.mT @ p["x"]
    mhc = MHCConfig(convention=name)
    wanted = (collapsed[0], post[0], comb[0].mT, y[0])
    for mine, other in zip(ours(mhc, p), wanted, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)
    end = getattr(theirs, f"{prefix}HyperHead")
    if mhc.learned_head:
        got, wanted_end = head(mhc, p), in_float64(end(config), p, head=True)(p["x"][None])
    else:
        got, wanted_end = p["x"].mean(-2), end()(p["x"][None])
    torch.testing.assert_close(got, wanted_end[0], **EXACT)


@pytest.mark.parametrize("name", ["deepseek_v4", "glm_5_3"])
def test_the_presets_eps_are_those_of_the_models_configurations(name: str) -> None:
    classes = {
        "deepseek_v4": ("deepseek_v4", "DeepseekV4Config"),
        "glm_5_3": ("glm5_next", "Glm5NextTextConfig"),
    }
    model, kind = classes[name]
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    module = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    assert transformers
    config = getattr(module, kind)()
    mhc = MHCConfig(convention=name)
    assert (config.rms_norm_eps, config.hc_eps) == (mhc.norm_eps, mhc.pre_eps)
    assert (config.hc_eps, config.hc_mult) == (mhc.sinkhorn_eps, mhc.num_streams)
    assert config.hc_sinkhorn_iters == mhc.sinkhorn_iterations


@pytest.mark.parametrize("scale", RMS)
def test_megatrons_own_module_of_august(scale: float) -> None:
    theirs = recorded("megatron_main_2026_08", scale)
    u, h_post, h_res, _ = ours(MHCConfig(convention="megatron_main_2026_08"), site(scale))
    # its own clamp acts on sums below 1e-6 alone
    for mine, name in ((u, "u"), (h_post, "h_post"), (h_res, "h_res")):
        torch.testing.assert_close(mine, theirs[name], **EXACT)


@pytest.mark.parametrize("scale", RMS)
def test_megatrons_own_module_of_dev(scale: float) -> None:
    """Which has a learned head too."""
    theirs, p = recorded("megatron_dev", scale), site(scale)
    mhc = MHCConfig(convention="megatron_dev")
    for mine, name in zip(
        (*ours(mhc, p), head(mhc, p)), ("u", "h_post", "h_res", "y", "end"), strict=True
    ):
        torch.testing.assert_close(mine, theirs[name], **EXACT)


@pytest.mark.parametrize("scale", RMS)
def test_automodel_has_the_same_single_pass(scale: float) -> None:
    """Four sites of DeepSeek-V4.1 from the start: each reads with the H_pre of the one before."""
    theirs, p = recorded("deepseek_v4_1", scale), site(scale)
    given = options(MHCConfig(convention="deepseek_v4_1"))
    y = p["x"][:, :1].repeat(1, N, 1)
    h_pre, mixing, f = torch.eye(N, dtype=torch.float64)[0].expand(len(y), N), None, p["f"]
    for k in range(SITES):
        parameters = [rolled(p, k)[name] for name in ("phi", "alpha", "bias")]
        if mixing is None:
            u = reference.aggregate(y, h_pre)
            h_pre, *mixing = reference.coefficients(y, *parameters, **given)
        else:
            y, u, h_pre, *mixing = reference.combine_read(
                y, f, *mixing, h_pre, *parameters, **given
            )
        found = {"x": y, "u": u, "h_pre": h_pre, "h_post": mixing[0], "h_res": mixing[1]}
        for name, mine in found.items():
            torch.testing.assert_close(mine, theirs[f"{name}{k}"], **EXACT)
        f = u.tanh()
    end = reference.aggregate(reference.combine(y, f, *mixing), h_pre)
    torch.testing.assert_close(end, theirs["end"], **EXACT)
