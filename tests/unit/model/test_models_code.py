"""Conventions against their models' own public code, where a package has it, in float64."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mhc import MHCConfig
from megatron_mhc.kernels import reference
from tests.unit.model.test_conventions import (
    EXACT,
    ITERATIONS,
    RMS,
    WIDTH,
    N,
    head,
    options,
    ours,
    site,
)


def models_code(model: str) -> Any:
    """The file of transformers that has a model's code."""
    return pytest.importorskip(
        f"transformers.models.{model}.modeling_{model}", reason="transformers is not installed"
    )


def in_float64(module: torch.nn.Module, p: dict[str, Tensor], head: bool = False) -> Any:
    """A module of theirs with our parameters, res rows in their order."""
    if head:
        values = dict(hc_fn=p["phi"][:N], hc_base=p["bias"][:N], hc_scale=p["alpha"][:1])
    else:
        fn, base = (reference.transpose_res_rows(p[name], N) for name in ("phi", "bias"))
        values = dict(fn=fn, base=base, scale=p["alpha"])
    for name, value in values.items():
        setattr(module, name, torch.nn.Parameter(value))
    return module


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


def not_compiled(function: Any) -> Any:
    """What `torch.compile` was given."""
    return getattr(function, "_torchdynamo_orig_callable", function)


def native_code() -> Any:
    """Megatron's module of hyper-connections."""
    return pytest.importorskip(
        "megatron.core.transformer.hyper_connection", reason="Megatron-Core has no mHC"
    )


def native_site(p: dict[str, Tensor]) -> SimpleNamespace:
    """What a method of its HyperConnectionModule reads from `self`."""
    alphas = zip(("alpha_pre", "alpha_post", "alpha_res"), p["alpha"].split(1), strict=True)
    return SimpleNamespace(n=N, bias=p["bias"], compute_h_eps=1e-6, **dict(alphas))


@pytest.mark.parametrize("scale", RMS)
def test_megatrons_own_module_of_august(scale: float) -> None:
    """With the source of that time (`make test-main`): later ones compute something else."""
    native = native_code()
    if not hasattr(native.SinkhornKnopp, "_sinkhorn_normalize"):
        pytest.skip(
            "this Megatron-Core's mHC computes something else (the preset megatron_dev): the one of"
            " August 2026 is in no wheel, `make test-main MEGATRON_LM=` a checkout of d98e8a64dd"
        )
    p = site(scale)
    v = p["x"].flatten(-2)[:, None]
    inverse_norm = 1.0 / (v.norm(dim=-1, keepdim=True) / (N * WIDTH) ** 0.5 + 1e-6)
    compute = not_compiled(native.HyperConnectionModule._compute_h)
    h_pre, h_post, h_res = compute(native_site(p), v @ p["phi"].t(), inverse_norm)
    h_res = native.SinkhornKnopp.apply(h_res.view(-1, 1, N, N), ITERATIONS)
    u, *mixing, _ = ours(MHCConfig(convention="megatron_main_2026_08"), p)
    # its own clamp acts on sums below 1e-6 alone
    torch.testing.assert_close(u, (h_pre.mT * p["x"]).sum(-2), **EXACT)
    for mine, other in zip(mixing, (h_post[:, 0], h_res[:, 0]), strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


@pytest.mark.parametrize("scale", RMS)
def test_megatrons_own_module_of_dev(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the source of dev (`make test-main`), which has a learned head too."""
    native = native_code()
    if not hasattr(native, "learned_output_contract"):
        pytest.skip(
            "this Megatron-Core's mHC ends with the mean: dev's is in no wheel, `make test-main"
            " MEGATRON_LM=` a checkout of d48bd6be0a"
        )
    p = site(scale)
    theirs = {**p, **{k: reference.transpose_res_rows(p[k], N) for k in ("phi", "bias")}}
    v = p["x"].flatten(-2)
    projected, r = not_compiled(native.native_proj_rms)(v, theirs["phi"])
    compute = not_compiled(native.HyperConnectionModule._compute_h)
    h_pre, h_post, logits = compute(native_site(theirs), projected[:, None], r[:, None])
    matrix = not_compiled(native._sinkhorn_iterations)(logits.view(-1, N, N), ITERATIONS, 1e-6)
    x, f = p["x"][:, None], p["f"][:, None]
    u = not_compiled(native.native_h_aggregate)(x, h_pre)
    y = not_compiled(native.native_h_post_bda)(matrix, x, h_post, f, None)
    mhc = MHCConfig(convention="megatron_dev")
    wanted = (u[:, 0], h_post[:, 0], matrix.mT, y[:, 0])
    for mine, other in zip(ours(mhc, p), wanted, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)
    with monkeypatch.context() as inside:  # what casts to fp32 there casts to float64 here
        inside.setattr(torch, "float32", torch.float64)
        contract = not_compiled(native.learned_output_contract)
        end = contract(v, p["phi"][:N], p["bias"][:N], p["alpha"][:1], N, 1e-5)
    torch.testing.assert_close(head(mhc, p), end, **EXACT)


@pytest.mark.parametrize("scale", RMS)
def test_automodel_has_the_same_single_pass(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four sites of DeepSeek-V4.1 from the start: each reads with the H_pre of the one before."""
    theirs = pytest.importorskip(
        "nemo_automodel.components.models.deepseek_v41.layers",
        reason="nemo-automodel is not installed",
        exc_type=ImportError,
    )
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = SimpleNamespace(
        hc_mult=N,
        hc_sinkhorn_iters=ITERATIONS,
        hc_eps=1e-6,
        rms_norm_eps=1e-20,
        hidden_size=WIDTH,
        initializer_range=0.02,
    )
    p, given = site(scale), options(MHCConfig(convention="deepseek_v4_1"))
    y = x = p["x"][:, :1].repeat(1, N, 1)
    first = torch.eye(N, dtype=torch.float64)[0].expand(len(x), N)
    their_pre, our_pre, mixing, f = first[None], first, None, p["f"]
    for index in range(4):
        parameters = [p["phi"].roll(index, 1), p["alpha"], p["bias"].roll(index)]
        own = in_float64(
            theirs.DeepseekV41HyperConnection(config),
            {
                **p,
                "phi": parameters[0],
                "bias": parameters[2],
            },
        )
        mix = own(x[None])
        collapsed = own.collapse(x[None], their_pre)[0]
        if mixing is None:
            u = reference.aggregate(y, our_pre)
            our_pre, *coefficients = reference.coefficients(y, *parameters, **given)
        else:
            y, u, our_pre, *coefficients = reference.combine_read(
                y, f, *mixing, our_pre, *parameters, **given
            )
        for mine, other in (
            (y, x),
            (u, collapsed),
            (our_pre, mix.pre[0]),
            (coefficients[0], mix.post[0]),
            (coefficients[1], mix.comb[0].mT),
        ):
            torch.testing.assert_close(mine, other, **EXACT)
        f, mixing, their_pre = u.tanh(), coefficients, mix.pre
        x = own.expand(collapsed.tanh()[None], x[None], mix)[0]
    end = own.collapse(x[None], their_pre)[0]
    y = reference.combine(y, f, *mixing)
    torch.testing.assert_close(reference.aggregate(y, our_pre), end, **EXACT)
