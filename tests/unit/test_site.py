"""What one site leaves on the next is used for the streams it belongs to, and for no others."""

import pytest
import torch
from torch import Tensor

from megatron_mhc import MHCConfig
from megatron_mhc.model.connection import HyperConnection
from megatron_mhc.model.layer import Site

N, WIDTH = 4, 8


def two_sites() -> tuple[Site, Site]:
    """Two sites that follow each other, with parameters away from their start."""
    sites = [Site(HyperConnection(MHCConfig(), WIDTH, index)) for index in range(2)]
    generator = torch.Generator().manual_seed(0)
    for site in sites:
        for parameter in site.connection.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    sites[0].following = sites[1]
    return sites[0], sites[1]


def pass_first(first: Site) -> tuple[Tensor, list[int]]:
    """Streams behind the first site, and a list of the second connection's calls from then on."""
    streams = torch.randn(3, 2, N * WIDTH, generator=torch.Generator().manual_seed(1))
    (u,) = first.read(torch.nn.Identity(), (streams,))
    written = first.write(True, False)((u.tanh(), None), streams, 0.0)
    calls: list[int] = []
    assert first.following is not None
    first.following.connection.register_forward_hook(lambda *_: calls.append(1))
    return written, calls


def read_alone(site: Site, streams: Tensor) -> Tensor:
    """u as the site's connection makes it, whatever was left on the site."""
    return site.connection(streams.unflatten(-1, (N, WIDTH)))[1]


def test_the_same_streams_are_not_read_again() -> None:
    first, second = two_sites()
    streams, calls = pass_first(first)
    (u,) = second.read(torch.nn.Identity(), (streams,))
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
        second.read(torch.nn.Identity(), (streams,))
    (u,) = second.read(torch.nn.Identity(), (streams,))
    assert len(calls) == 1
    torch.testing.assert_close(u, read_alone(second, streams), rtol=0, atol=0)


def test_a_residual_of_other_streams_is_refused() -> None:
    first, _ = two_sites()
    streams = torch.randn(3, 2, N * WIDTH)
    (u,) = first.read(torch.nn.Identity(), (streams,))
    with pytest.raises(RuntimeError, match="got other streams than its norm slot read"):
        first.write(True, False)((u, None), streams.clone(), 0.0)


def test_streams_of_another_width_are_refused() -> None:
    first, _ = two_sites()
    with pytest.raises(ValueError, match="width 8; expected 4 streams of 8 = 32 channels"):
        first.read(torch.nn.Identity(), (torch.randn(3, 2, WIDTH),))


def test_a_norm_without_a_graph_before_a_sublayer_with_one_is_refused() -> None:
    """As a checkpoint around the norm alone would have it: the streams' gradient would be lost."""
    first, _ = two_sites()
    streams = torch.randn(3, 2, N * WIDTH)
    with torch.no_grad():
        (u,) = first.read(torch.nn.Identity(), (streams,))
    with pytest.raises(RuntimeError, match="a checkpoint around the norm alone would lose"):
        first.write(True, False)((u.requires_grad_() * 1, None), streams, 0.0)
