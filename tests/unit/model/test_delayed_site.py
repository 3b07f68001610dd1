"""Delayed sites: what reads with which H_pre, in one operation or apart, and what is refused."""

import functools
import itertools

import pytest
import torch
from torch import Tensor

from megatron_mhc import MHCConfig, kernels
from megatron_mhc.kernels import reference
from megatron_mhc.model.connection import HyperConnection, initial_bias
from megatron_mhc.model.site import Site

N, WIDTH, SITES = 4, 8, 4
DELAYED = MHCConfig(convention="deepseek_v4_1", sinkhorn_iterations=5)
OPTIONS = {"iterations": 5, "norm_eps": 1e-20, "pre_eps": 1e-6, "sinkhorn_eps": 1e-6}


def chain(fused: bool) -> list[Site]:
    """Sites from a model's entry to its end, with parameters away from their start."""
    sites = [Site(HyperConnection(DELAYED, WIDTH, k), torch.nn.Identity()) for k in range(SITES)]
    generator = torch.Generator().manual_seed(0)
    for site in sites:
        for parameter in site.connection.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    for site, after in itertools.pairwise(sites):
        site.following = after if fused else None
    sites[0].is_entry = True
    sites[-1].contract = lambda x, h_pre: kernels.aggregate(x, h_pre)
    return sites


def embedding(dtype: torch.dtype = torch.float32) -> Tensor:
    """What comes in: one stream [s, b, C]."""
    return torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(sites: list[Site], hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What leaves the last site, and u of each, for F = tanh."""
    us = []
    for site in sites:
        u, residual = site.read(hidden)
        us.append(u)
        hidden = site.write(True, False)((u.tanh(), None), residual, 0.0)
    return hidden, us


def exact(sites: list[Site], parameters: list[list[Tensor]], x: Tensor) -> tuple[Tensor, list]:
    """The same from the formulas: u_k = p_{k-1} x_k, and the last p ends it."""
    streams = x.unsqueeze(-2).repeat(1, 1, N, 1)
    p = torch.zeros(*x.shape[:-1], N, dtype=x.dtype)
    p[..., 0] = 1
    us = []
    for phi, alpha, bias in parameters:
        u = torch.einsum("sbn,sbnc->sbc", p, streams)
        p, post, res = reference.coefficients(streams, phi, alpha, bias, **OPTIONS)
        streams = torch.einsum("sbij,sbjc->sbic", res, streams)
        streams = streams + post.unsqueeze(-1) * u.tanh().unsqueeze(-2)
        us.append(u)
    return torch.einsum("sbn,sbnc->sbc", p, streams), us


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
def test_a_model_of_sites_equals_the_formulas_in_float64(fused: bool) -> None:
    sites, x = chain(fused), embedding().requires_grad_()
    out, us = run(sites, x)
    assert torch.equal(us[0], x)  # stream 0 alone, which is the embedding
    (out * torch.linspace(-1, 1, WIDTH)).sum().backward()
    parameters = [
        [p.detach().double().requires_grad_() for p in site.connection.parameters()]
        for site in sites
    ]
    leaf = x.detach().double().requires_grad_()
    want, want_us = exact(sites, parameters, leaf)
    (want * torch.linspace(-1, 1, WIDTH).double()).sum().backward()
    # fp32 over four sites; gradients are sums over tokens of terms that cancel in part
    close = functools.partial(torch.testing.assert_close, rtol=2e-5, atol=2e-5)
    close(out.double(), want)
    close(x.grad.double(), leaf.grad)
    for u, wanted in zip(us, want_us, strict=True):
        close(u.double(), wanted)
    for site, exacts in zip(sites, parameters, strict=True):
        for parameter, wanted in zip(site.connection.parameters(), exacts, strict=True):
            # the first site's streams are equal: no mixing of them matters
            assert parameter.grad is not None and wanted.grad is not None
            close(parameter.grad.double(), wanted.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sites_apart_are_fused_ones_to_the_bit(dtype: torch.dtype) -> None:
    """What H_pre loses on its way in columns: nothing."""
    found = []
    for fused in (True, False):
        sites, x = chain(fused), embedding(dtype)
        out, us = run(sites, x)
        found.append([out, *us])
    assert all(map(torch.equal, *found))


def test_what_a_site_hands_on_where_the_next_one_is_apart() -> None:
    first, *_ = chain(fused=False)
    u, residual = first.read(embedding())
    assert residual.next_pre[0].shape == (3, 2, N) and residual.for_rebuild == ()
    joined = first.write(True, False)((u, None), residual, 0.0)
    assert joined.shape == (3, 2, N * WIDTH + N)
    assert torch.equal(joined[..., N * WIDTH :], residual.next_pre[0])


def test_streams_without_their_h_pre_are_refused() -> None:
    """Read anew, as other conventions may: H_pre of the site before cannot be made again."""
    first, second, *_ = chain(fused=True)
    u, residual = first.read(embedding())
    streams = first.write(True, False)((u, None), residual, 0.0)
    with pytest.raises(RuntimeError, match=r"a delayed site got streams alone, .*granularity full"):
        second.read(streams + 1)
    with pytest.raises(ValueError, match=r"4 streams of 8 and 4 columns of H_pre = 36 channels"):
        second.read(torch.randn(3, 2, 35))


def test_a_bias_is_of_the_site_that_reads_with_it() -> None:
    """At the start site k reads stream k mod n most, delayed or not, and the first one stream 0."""
    for site in range(5):
        plain = initial_bias(MHCConfig(), site + 1)
        assert torch.equal(initial_bias(DELAYED, site), plain)
        assert plain[:N].argmax() == (site + 1) % N
