"""A site alone: what its two slots hand on, what it leaves on the next site, what is refused."""

import copy
from typing import Any

import pytest
import torch
from megatron.core import utils
from torch import Tensor

from megatron_mhc import MHCConfig
from megatron_mhc.model.connection import HyperConnection
from megatron_mhc.model.site import Residual, Site

N, WIDTH = 4, 8


def two_sites(norm: torch.nn.Module | None = None) -> tuple[Site, Site]:
    """Two sites that follow each other, with parameters away from their start."""
    sites = [
        Site(HyperConnection(MHCConfig(), WIDTH, index), norm or torch.nn.Identity())
        for index in range(2)
    ]
    generator = torch.Generator().manual_seed(0)
    for site in sites:
        for parameter in site.connection.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    sites[0].following = sites[1]
    return sites[0], sites[1]


def batch(seed: int = 1) -> Tensor:
    """Streams [s, b, n*C]."""
    return torch.randn(3, 2, N * WIDTH, generator=torch.Generator().manual_seed(seed))


def pass_first(first: Site) -> tuple[Tensor, list[int]]:
    """Streams behind the first site, and a list of the second connection's calls from then on."""
    u, residual = first.read(batch())
    written = first.write(True, False)((u.tanh(), None), residual, 0.0)
    calls: list[int] = []
    assert first.following is not None
    first.following.connection.register_forward_hook(lambda *_: calls.append(1))
    return written, calls


def read_alone(site: Site, streams: Tensor) -> Tensor:
    """u as the site's connection makes it, whatever was left on the site."""
    return site.connection(streams)[1]


def test_the_same_streams_are_not_read_again() -> None:
    first, second = two_sites()
    streams, calls = pass_first(first)
    u, _ = second.read(streams)
    assert not calls
    torch.testing.assert_close(u, read_alone(second, streams), rtol=0, atol=0)


@pytest.mark.parametrize("change", ["other streams", "changed in place", "read twice"])
def test_other_streams_are_read_anew(change: str) -> None:
    first, second = two_sites()
    streams, calls = pass_first(first)
    if change == "other streams":
        streams = streams.detach().clone() + 1
    elif change == "changed in place":
        with torch.no_grad():
            streams += 1
    else:
        second.read(streams)
    u, _ = second.read(streams)
    assert len(calls) == 1
    torch.testing.assert_close(u, read_alone(second, streams), rtol=0, atol=0)


def test_a_norm_keeps_its_class_and_keys_and_returns_the_residual() -> None:
    norm = torch.nn.LayerNorm(WIDTH)
    site = Site(HyperConnection(MHCConfig(), WIDTH, 0), norm)
    streams = batch()
    normed, residual = norm(streams)
    torch.testing.assert_close(
        normed, torch.nn.LayerNorm(WIDTH)(read_alone(site, streams)), rtol=0, atol=0
    )
    assert type(norm) is torch.nn.LayerNorm and set(norm.state_dict()) == {"weight", "bias"}
    assert isinstance(residual, Residual) and residual.streams.data_ptr() == streams.data_ptr()


def test_a_copy_of_a_layer_has_sites_of_its_own() -> None:
    layer = torch.nn.Module()
    layer.connection = HyperConnection(MHCConfig(), WIDTH, 0)
    layer.norm = torch.nn.LayerNorm(WIDTH)
    layer.site = Site(layer.connection, layer.norm)
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        layer.norm.weight.zero_()
        layer.connection.bias.zero_()
    assert copied.norm.forward.__self__ is copied.site
    assert copied.site.connection is copied.connection
    normed, _ = copied.norm(batch())
    u = read_alone(copied.site, batch())
    torch.testing.assert_close(normed, torch.nn.LayerNorm(WIDTH)(u), rtol=0, atol=0)


def test_the_slots_may_stand_on_different_sides_of_a_cut_graph() -> None:
    """As in a schedule of nodes: each part has a graph of its own, joined by hand."""
    whole, parts = two_sites()[0], two_sites()[0]
    whole.following = parts.following = None
    streams = [batch().requires_grad_() for _ in range(2)]
    u, residual = whole.read(streams[0])
    y = whole.write(True, False)((u.tanh(), None), residual, 0.0)
    y.sum().backward()
    u, before = parts.read(streams[1])
    after = Residual(*(t.detach().requires_grad_() for t in before[:3]))
    cut = u.detach().requires_grad_()
    parts.write(True, False)((cut.tanh(), None), after, 0.0).sum().backward()
    pairs = [(u, cut), *zip(before[:3], after[:3], strict=True)]
    torch.autograd.backward([old for old, _ in pairs], [new.grad for _, new in pairs])
    # the gradients of the streams are added in another order
    torch.testing.assert_close(streams[0].grad, streams[1].grad, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(
        whole.connection.parameters(), parts.connection.parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-6)


def test_the_entry_replicates_and_the_exit_contracts() -> None:
    first, second = two_sites()
    first.is_entry, second.contract = True, lambda x: x.mean(-2)
    u, residual = first.read(batch()[..., :WIDTH])
    torch.testing.assert_close(residual.streams, batch()[..., :WIDTH].repeat(1, 1, N))
    u, residual = second.read(first.write(True, False)((u, None), residual, 0.0))
    inside, second.contract = second.contract, None
    streams = second.write(True, False)((u, None), residual, 0.0)
    second.contract = inside
    left = second.write(True, False)((u, None), residual, 0.0)
    torch.testing.assert_close(left, streams.unflatten(-1, (N, WIDTH)).mean(-2))


def test_everything_that_a_residual_holds_is_recorded() -> None:
    seen: list[Any] = []

    class Recorded(Tensor):
        def record_stream(self, stream: Any) -> None:
            seen.append((self, stream))

    tensors = [torch.zeros(1).as_subclass(Recorded) for _ in range(4)]
    Residual(*tensors[:3], tuple(tensors[3:])).record_stream("side stream")
    assert [tensor is one for one, (tensor, _) in zip(tensors, seen, strict=True)] == [True] * 4
    assert {stream for _, stream in seen} == {"side stream"}


def test_another_residual_than_the_norm_slots_is_refused() -> None:
    first, _ = two_sites()
    u, residual = first.read(batch())
    with pytest.raises(RuntimeError, match="got Tensor, not what its norm slot returned"):
        first.write(True, False)((u, None), residual.streams, 0.0)


class FusedResidual(torch.nn.Identity):
    """A norm that returns a residual of its own."""

    def forward(self, u: Tensor) -> Any:
        """(norm(u), u)."""
        return u, u


def test_a_norm_with_a_residual_of_its_own_is_refused() -> None:
    first, _ = two_sites(FusedResidual())
    with pytest.raises(RuntimeError, match="the norm of a site returned tuple, not a tensor"):
        first.read(batch())


def test_streams_of_another_width_are_refused() -> None:
    first, _ = two_sites()
    with pytest.raises(ValueError, match="width 8; expected 4 streams of 8 = 32 channels"):
        first.read(torch.randn(3, 2, WIDTH))
    first.is_entry = True
    with pytest.raises(ValueError, match="width 32; expected one stream of 8 channels"):
        first.read(batch())


def test_a_norm_without_a_graph_before_a_sublayer_with_one_is_refused() -> None:
    """As a checkpoint around the norm alone would have it: the streams' gradient would be lost."""
    first, _ = two_sites()
    with torch.no_grad():
        u, residual = first.read(batch())
    with pytest.raises(RuntimeError, match="a checkpoint around the norm alone would lose"):
        first.write(True, False)((u.requires_grad_() * 1, None), residual, 0.0)


def test_frozen_streams_and_connections_let_the_sublayer_train() -> None:
    first, second = two_sites()
    for site in (first, second):
        site.connection.requires_grad_(False)
    weight = torch.ones(WIDTH, requires_grad=True)
    u, residual = first.read(batch())
    first.write(True, False)((u * weight, None), residual, 0.0).sum().backward()
    assert weight.grad is not None and weight.grad.any()


def test_reading_and_writing_are_ranges_of_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("end"))
    monkeypatch.setattr(utils, "_nvtx_enabled", True)  # as --profile sets it
    first, _ = two_sites()
    u, residual = first.read(batch())
    first.write(True, False)((u, None), residual, 0.0)
    assert seen == ["mhc.read", "end", "mhc.write", "end"]


def test_the_norm_of_a_site_says_that_it_returns_a_residual() -> None:
    """What Megatron from 0.20 on asks it, before it takes the two apart."""
    norm = torch.nn.Identity()
    Site(HyperConnection(MHCConfig(), WIDTH, 0), norm)
    assert norm.returns_residual is True
