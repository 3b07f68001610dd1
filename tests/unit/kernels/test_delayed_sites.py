"""`combine_read`, the boundary of delayed sites, against DeepSeek-V4.1's formulas in float64."""

import functools
import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megatron_mhc.kernels import reference
from tests.unit.kernels.test_reference import site_inputs

OPTIONS = {"iterations": 20, "norm_eps": 1e-20, "pre_eps": 1e-6, "sinkhorn_eps": 1e-6}
"""Of DeepSeek-V4.1."""
EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""Some thousand roundings of float64 over the sites of a chain."""


def by_hand(x: Tensor, p: dict[str, Tensor]) -> tuple[list[float], list[float], list[list[float]]]:
    """p_k, H_post and H_res [dst][src] of one token's streams, with scalar arithmetic."""
    n, span = x.shape[0], range(x.shape[0])
    v = x.flatten().tolist()
    r = math.sqrt(sum(value * value for value in v) / len(v) + 1e-20)

    def logit(row: int, group: int) -> float:
        z = sum(a * b for a, b in zip(v, p["phi"][row].tolist(), strict=True))
        return p["alpha"][group].item() * z / r + p["bias"][row].item()

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    # theirs is comb[src][dst]: softmax over dst, + eps; over the sums over src; then dst and src
    comb = [[math.exp(logit(2 * n + dst * n + src, 2)) for dst in span] for src in span]
    comb = [[value / sum(row) + 1e-6 for value in row] for row in comb]
    for step in range(2 * 20 - 1):
        if step % 2 == 0:
            sums = [sum(comb[src][dst] for src in span) + 1e-6 for dst in span]
            comb = [[comb[src][dst] / sums[dst] for dst in span] for src in span]
        else:
            comb = [[value / (sum(row) + 1e-6) for value in row] for row in comb]
    pre = [sigmoid(logit(j, 0)) + 1e-6 for j in span]
    post = [2 * sigmoid(logit(n + j, 1)) for j in span]
    return pre, post, [[comb[src][dst] for src in span] for dst in span]


def chain_by_hand(embedding: Tensor, sites: list[dict[str, Tensor]]) -> tuple[list[Tensor], Tensor]:
    """u of every site, for F = tanh, and what ends the model, for one token's embedding [C]."""
    n, width = 4, embedding.shape[0]
    x, weights, us = [embedding.tolist()] * n, [1.0, 0.0, 0.0, 0.0], []
    for p in sites:
        pre, post, res = by_hand(torch.tensor(x, dtype=torch.float64), p)
        u = [sum(weights[j] * x[j][c] for j in range(n)) for c in range(width)]
        f = [math.tanh(value) for value in u]
        x = [
            [sum(res[i][j] * x[j][c] for j in range(n)) + post[i] * f[c] for c in range(width)]
            for i in range(n)
        ]
        us.append(torch.tensor(u, dtype=torch.float64))
        weights = pre
    end = [sum(weights[j] * x[j][c] for j in range(n)) for c in range(width)]
    return us, torch.tensor(end, dtype=torch.float64)


def test_a_chain_of_sites_equals_scalar_formulas() -> None:
    sites = [site_inputs(4, seed=seed) for seed in range(6)]
    parameters = [[p[name] for name in ("phi", "alpha", "bias")] for p in sites]
    embedding = sites[0]["f"]
    tokens = embedding.shape[0]
    x = embedding.unsqueeze(-2).repeat(1, 4, 1)
    first = torch.eye(4, dtype=torch.float64)[0].expand(tokens, 4)
    us = [reference.aggregate(x, first)]
    assert torch.equal(us[0], embedding)
    h_pre, h_post, h_res = reference.coefficients(x, *parameters[0], **OPTIONS)
    for following in parameters[1:]:
        mixing = (us[-1].tanh(), h_post, h_res)
        x, u, h_pre, h_post, h_res = reference.combine_read(
            x, *mixing, h_pre, *following, **OPTIONS
        )
        us.append(u)
    end = reference.aggregate(reference.combine(x, us[-1].tanh(), h_post, h_res), h_pre)
    for token in range(tokens):
        wanted_us, wanted_end = chain_by_hand(embedding[token], sites)
        for got, wanted in zip([*us, end], [*wanted_us, wanted_end], strict=True):
            torch.testing.assert_close(got[token], wanted, **EXACT)


def test_it_is_a_combine_a_read_and_coefficients_of_the_rounded_streams() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        p, following = site_inputs(4), site_inputs(4, seed=1)
        small = torch.float64 if dtype == torch.float64 else torch.float32
        x, f = p["x"].to(dtype), p["f"].to(dtype)
        parameters = [following[name].to(small) for name in ("phi", "alpha", "bias")]
        h_pre, h_post, h_res = reference.coefficients(x, *parameters, **OPTIONS)
        f_bias = torch.ones(5, dtype=small)
        y, u, *coefficients = reference.combine_read(
            x, f, h_post, h_res, h_pre, *parameters, f_bias=f_bias, **OPTIONS
        )
        assert y.dtype == u.dtype == dtype and {c.dtype for c in coefficients} == {small}
        assert torch.equal(y, reference.combine(x, f, h_post, h_res, f_bias))
        assert torch.equal(u, reference.aggregate(y, h_pre))
        alone = reference.coefficients(y, *parameters, **OPTIONS)
        assert all(map(torch.equal, coefficients, alone))


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_every_gradient(n: int) -> None:
    # from n = 4 on along random directions: one by one the entries of phi take ten seconds
    check = functools.partial(gradcheck, fast_mode=n >= 4)
    p, following = site_inputs(n, width=3, tokens=2), site_inputs(n, width=3, tokens=2, seed=1)
    own = [p[name] for name in ("phi", "alpha", "bias")]
    options = {**OPTIONS, "iterations": 5}
    h_pre, h_post, h_res = reference.coefficients(p["x"], *own, **options)
    tensors = (p["x"], p["f"], h_post, h_res, h_pre)
    tensors += tuple(following[name] for name in ("phi", "alpha", "bias"))
    leaves = tuple(t.detach().clone().requires_grad_() for t in (*tensors, torch.ones(3).double()))
    assert check(
        lambda *given: reference.combine_read(*given[:-1], f_bias=given[-1], **options), leaves
    )
