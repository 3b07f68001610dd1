"""Blocks of sites that drop and rebuild, alone: whose storage goes when, and what is refused."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mhc import MHCConfig
from megatron_mhc.model.connection import HyperConnection
from megatron_mhc.model.recompute import Block
from megatron_mhc.model.site import Site
from megatron_mhc.pipeline.state import rebuild_ahead

N, WIDTH = 4, 8


class Layers(torch.nn.Module):
    """Two layers of two sites each around tanh, behind norms; one block with recompute."""

    def __init__(
        self, recompute: bool = True, backend: str = "torch", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        mhc = MHCConfig(recompute=2 if recompute else None, backend=backend)
        self.connections = torch.nn.ModuleList(HyperConnection(mhc, WIDTH, i) for i in range(4))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH, dtype=dtype) for _ in range(4))
        pairs = zip(self.connections, self.norms, strict=True)
        self.sites = [Site(connection, norm) for connection, norm in pairs]
        self.recompute_block = Block(self.sites, backend) if recompute else None
        generator = torch.Generator().manual_seed(0)
        for parameter in self.connections.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        for index, site in enumerate(self.sites):
            site.following = self.sites[index + 1] if index < 3 else None
            site.block = self.recompute_block

    def forward(self, streams: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        """[s, b, n*C] -> the same; `seen` gets every norm's output."""
        for site, norm in zip(self.sites, self.norms, strict=True):
            normed, residual = norm(streams)
            if seen is not None:
                seen.append(normed.data)
            streams = site.write(True, False)((normed.tanh(), None), residual, 0.0)
        return streams


def batch(seed: int) -> Tensor:
    """Streams [s, b, n*C] that want a gradient."""
    values = torch.randn(3, 2, N * WIDTH, generator=torch.Generator().manual_seed(seed))
    return values.requires_grad_()


def is_there(tensors: list[Tensor]) -> list[bool]:
    """Whether each one's storage holds values."""
    return [tensor.untyped_storage().nbytes() > 0 for tensor in tensors]


def test_microbatches_drop_and_rebuild_each_their_own() -> None:
    layers, whole = Layers(), Layers(recompute=False)
    inputs, seen = [batch(i) for i in range(3)], [[], [], []]
    outputs = [layers(x, tensors) for x, tensors in zip(inputs, seen, strict=True)]
    assert not any(is_there(seen[0] + seen[1] + seen[2]))
    assert rebuild_ahead(layers), "the oldest one"
    assert all(is_there(seen[0])) and not any(is_there(seen[1] + seen[2]))
    outputs[1].sum().backward()
    assert all(is_there(seen[1])) and not any(is_there(seen[2]))
    assert rebuild_ahead(layers), "the one that is left"
    assert not rebuild_ahead(layers), "all are rebuilt"
    for output in (outputs[0], outputs[2]):
        output.sum().backward()
    for seed in (1, 0, 2):
        x = batch(seed)
        whole(x).sum().backward()
        assert torch.equal(x.grad, inputs[seed].grad)
    for mine, theirs in zip(layers.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_a_second_backward_through_the_same_graph() -> None:
    x = batch(0)
    loss = Layers()(x).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_a_graph_that_is_gone_leaves_nothing() -> None:
    layers, seen = Layers(), []
    output = layers(batch(0), seen)
    kept = weakref.ref(layers.recompute_block._microbatches[0]())
    assert kept() is not None
    gc.disable()  # it must go by itself: a cycle through the graph would keep its memory
    try:
        del output
        assert kept() is None
    finally:
        gc.enable()
    assert not rebuild_ahead(layers)


def test_without_gradients_nothing_is_dropped() -> None:
    layers, seen = Layers(), []
    with torch.no_grad():
        output = layers(batch(0), seen)
    assert all(is_there(seen)) and output.grad_fn is None
    assert not rebuild_ahead(layers)


def test_without_recompute_there_is_nothing_to_rebuild() -> None:
    layers = Layers(recompute=False)
    layers(batch(0))
    assert not rebuild_ahead(layers)


@pytest.mark.parametrize("recompute", [True, False])
def test_the_block_to_rebuild_is_looked_for_once(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk over a deep model's modules would cost every backward milliseconds."""
    chunk = torch.nn.Sequential(Layers(False), Layers(recompute), torch.nn.Identity())
    walks, walk = [], torch.nn.Module.named_modules

    def counted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
        walks.extend([module] * (module is chunk))
        return walk(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)  # `modules` goes over it too
    for layers in (chunk[1], Layers(recompute)):
        chunk[1] = layers  # found by its place, so what stood there before is let go
        for seed in range(3):
            output = chunk(batch(seed))
            assert rebuild_ahead(chunk) == recompute and not rebuild_ahead(chunk)
            output.sum().backward()
    assert len(walks) == 1


def test_a_block_that_was_dropped_from_the_model_is_looked_for_again() -> None:
    chunk = torch.nn.Sequential(Layers(True), Layers(True))
    chunk(batch(0)).sum().backward()
    assert not rebuild_ahead(chunk)
    del chunk[1]
    output = chunk(batch(1))
    assert rebuild_ahead(chunk) and not rebuild_ahead(chunk)
    output.sum().backward()


def test_streams_replaced_inside_a_block_are_refused() -> None:
    layers = Layers()
    site, block = layers.sites[0], layers.recompute_block
    x = batch(0)
    normed, residual = layers.norms[0](x)
    streams = site.write(True, False)((normed.tanh(), None), residual, 0.0)
    normed, residual = layers.norms[1](streams.clone())
    with pytest.raises(RuntimeError, match="read other streams than the site before wrote"):
        layers.sites[1].write(True, False)((normed.tanh(), None), residual, 0.0)
    x = batch(1)  # the next forward starts afresh
    layers(x).sum().backward()
    assert x.grad is not None and block is not None and not block.rebuild_oldest()


class HalfOfALargerTensor(torch.nn.LayerNorm):
    """A norm whose output shares its storage with something else."""

    def forward(self, u: Tensor) -> Tensor:
        """norm(u), a view of twice as much."""
        return torch.cat([super().forward(u), u])[: u.shape[0]]


def test_a_part_of_a_larger_storage_is_refused_before_anything_is_dropped() -> None:
    layers, seen = Layers(), []
    layers.sites[1]._norm = HalfOfALargerTensor(WIDTH)
    with pytest.raises(RuntimeError, match="a norm returned a part of a larger tensor"):
        layers(batch(0), seen)
    assert all(is_there(seen))
