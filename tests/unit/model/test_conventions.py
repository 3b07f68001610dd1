"""Each named convention against formulas in float64; `test_models_code` has models' own code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megatron_mhc import MHCConfig
from megatron_mhc.config import CONVENTIONS
from megatron_mhc.kernels import reference
from megatron_mhc.model.connection import Head, HyperConnection

N, WIDTH, ROWS, ITERATIONS = 4, 6, 24, 20
EXACT = {"rtol": 1e-12, "atol": 1e-13}
"""Some hundred roundings of float64, relative to sums that may cancel."""
RMS = (1.0, 1e-3)
"""Of the streams: eps in the norm is nothing beside the first, and much beside the second."""


def site(scale: float, tokens: int = 3) -> dict[str, Tensor]:
    """x, f, and what any of the models has at a site, in float64; res rows [dst, src]."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": scale * normal(tokens, N, WIDTH),
        "f": normal(tokens, WIDTH),
        "phi": 0.3 * normal(ROWS, N * WIDTH),
        "alpha": 0.5 + 0.1 * normal(3),
        # logits of H_res so far apart that Sinkhorn is not done after all its steps: they are told
        # by what is divided last
        "bias": torch.cat([normal(2 * N), 3 * normal(N * N)]),
    }


def options(mhc: MHCConfig) -> dict[str, Any]:
    """The keywords of the reference, as a model with these settings hands them on."""
    own = dict(HyperConnection(mhc, WIDTH, 0).options)
    del own["backend"]
    return own


def ours(mhc: MHCConfig, p: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """u, H_post, H_res and y of a site that reads with its own H_pre."""
    u, h_post, h_res = reference.pre(p["x"], p["phi"], p["alpha"], p["bias"], **options(mhc))
    return u, h_post, h_res, reference.combine(p["x"], p["f"], h_post, h_res)


def head(mhc: MHCConfig, p: dict[str, Tensor]) -> Tensor:
    """The learned end, with eps as the model's `Head` hands them on."""
    own = Head(mhc, WIDTH).double()
    for name, value in (("fn", p["phi"][:N]), ("scale", p["alpha"][:1]), ("base", p["bias"][:N])):
        setattr(own, name, torch.nn.Parameter(value))
    return own(p["x"])


def raw(p: dict[str, Tensor], inverse_norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of H_pre, H_post and H_res."""
    z = p["x"].flatten(-2) @ p["phi"].t() * inverse_norm
    alphas = p["alpha"].repeat_interleave(torch.tensor([N, N, N * N]))
    pre, post, res = (z * alphas + p["bias"]).split([N, N, N * N], -1)
    return pre, post, res.unflatten(-1, (N, N))


def mean_square(p: dict[str, Tensor]) -> Tensor:
    """Of all streams of a token."""
    return p["x"].flatten(-2).square().mean(-1, keepdim=True)


def v4_mixing(res: Tensor) -> Tensor:
    """V4's loop on comb [src, dst] with eps 1e-6, as ours [dst, src]."""
    comb = res.mT.softmax(-1) + 1e-6
    comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    for _ in range(ITERATIONS - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + 1e-6)
        comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    return comb.mT


def divided(res: Tensor, first: int) -> Tensor:
    """exp of the logits, divided by its sums over one index and then over the other."""
    matrix = res.exp()
    for _ in range(ITERATIONS):
        matrix = matrix / matrix.sum(first, keepdim=True)
        matrix = matrix / matrix.sum(-3 - first, keepdim=True)
    return matrix


Formula = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor, Tensor]]


def v4_formula(inverse_norm: Callable[[Tensor], Tensor]) -> Formula:
    """H_pre, H_post and H_res of V4's family, with a norm of the mean square."""

    def coefficients(p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, res = raw(p, inverse_norm(mean_square(p)))
        return pre.sigmoid() + 1e-6, 2 * post.sigmoid(), v4_mixing(res)

    return coefficients


def plain_formula(inverse_norm: Callable[[Tensor], Tensor], first: int) -> Formula:
    """The same without eps outside the norm, dividing by the sums over `first` first."""

    def coefficients(p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, res = raw(p, inverse_norm(mean_square(p)))
        return pre.sigmoid(), 2 * post.sigmoid(), divided(res, first)

    return coefficients


FORMULAS: dict[str, Formula] = {
    "paper": plain_formula(lambda square: 1 / (square + 1e-6).sqrt(), -2),
    "deepseek_v4": v4_formula(lambda square: 1 / (square + 1e-6).sqrt()),
    "deepseek_v4_1": v4_formula(lambda square: 1 / (square + 1e-20).sqrt()),
    "glm_5_3": v4_formula(lambda square: 1 / (square + 1e-5).sqrt()),
    # both: the root mean square, plus eps
    "megatron_dev": v4_formula(lambda square: 1 / (square.sqrt() + 1e-6)),
    "megatron_main_2026_08": plain_formula(lambda square: 1 / (square.sqrt() + 1e-6), -1),
}


@pytest.mark.parametrize("scale", RMS)
@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_convention_computes_its_formulas(name: str, scale: float) -> None:
    p = site(scale)
    mhc = MHCConfig(convention=name)
    got = reference.coefficients(p["x"], p["phi"], p["alpha"], p["bias"], **options(mhc))
    for mine, wanted in zip(got, FORMULAS[name](p), strict=True):
        torch.testing.assert_close(mine, wanted, **EXACT)


def test_no_two_formulas_are_alike() -> None:
    """Else a convention could be another one's, and no test would see it."""
    p = site(1e-3)
    found = [torch.cat([part.flatten() for part in f(p)]) for f in FORMULAS.values()]
    for i, one in enumerate(found):
        assert all((one - other).abs().max() > 1e-7 for other in found[:i])


@pytest.mark.parametrize("name", CONVENTIONS)
def test_every_gradient_of_a_convention(name: str) -> None:
    p = site(1.0, tokens=1)
    given = {**options(MHCConfig(convention=name)), "iterations": 3}
    leaves = tuple(p[k].requires_grad_() for k in ("x", "phi", "alpha", "bias"))
    # along random directions: 576 entries of phi one by one take seconds
    assert gradcheck(
        lambda *tensors: reference.coefficients(*tensors, **given), leaves, fast_mode=True
    )


def test_streams_that_are_zero_have_a_gradient() -> None:
    """The norm of nothing has none of its own, in either form."""
    p = site(0.0)
    for form in ("inside_root", "outside_root"):
        x = p["x"].clone().requires_grad_()
        u, _, h_res = reference.pre(x, p["phi"], p["alpha"], p["bias"], norm_form=form)
        (u.sum() + h_res.square().sum()).backward()
        assert x.grad is not None and bool(x.grad.isfinite().all()) and bool(x.grad.any())


@pytest.mark.parametrize("scale", RMS)
def test_the_ends(scale: float) -> None:
    """The head of V4 takes the sites' eps, that of Megatron's dev the model's layernorm_epsilon."""
    p = site(scale)
    for mhc, norm_eps, pre_eps in (
        (MHCConfig(convention="deepseek_v4"), 1e-6, 1e-6),
        (MHCConfig(convention="deepseek_v4", norm_eps=1e-20), 1e-20, 1e-6),
        (MHCConfig(convention="megatron_dev"), 1e-5, 1e-5),
        (MHCConfig(convention="megatron_dev", head_eps=1e-4), 1e-4, 1e-4),
    ):
        z = p["x"].flatten(-2) @ p["phi"][:N].t() / (mean_square(p) + norm_eps).sqrt()
        weights = (p["alpha"][0] * z + p["bias"][:N]).sigmoid() + pre_eps
        wanted = (weights.unsqueeze(-1) * p["x"]).sum(-2)
        torch.testing.assert_close(head(mhc, p), wanted, **EXACT)
    ends = {name: convention.end for name, convention in CONVENTIONS.items()}
    assert ends == {
        "paper": "mean",
        "deepseek_v4": "head",
        "deepseek_v4_1": "last_pre",
        "glm_5_3": "mean",
        "megatron_main_2026_08": "mean",
        "megatron_dev": "head",
    }
