"""Selective recompute of the streams (paper 4.3.2): dropped after the forward, rebuilt in one go.

A block is some consecutive layers of one model chunk. When its last site has written, the storage
of all that it can rebuild is released: the streams inside the block, u, and norm(u) where the norm
is a module of its own. The streams at its start, F's outputs and the coefficients stay. A hook on
the autograd node behind the block, which runs before anything inside needs its input, allocates the
same storages again and refills them: no sublayer runs, and nothing is communicated.

Whoever saved one of these tensors (autograd, Transformer Engine, a checkpoint around F) holds the
storage, so finds its values again; saved-tensor hooks would see only what autograd saves. Nothing
is released before the block is complete and its hook is set: an exception before that leaves all
tensors whole, one after it leaves a graph that frees itself. What one microbatch dropped is known
to its own graph alone.
"""

import contextlib
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mhc import kernels


class RecomputeRecord(NamedTuple):
    """What a site that has read and written hands to its block.

    Attributes:
        x: the streams [..., n, C] that it read; u: [..., C]; h_pre: [..., n].
        norm, normed: the norm slot's module, and norm(u) where that is not u itself.
        mixing: what it left for its `combine`.
    """

    x: Tensor
    u: Tensor
    h_pre: Tensor
    norm: torch.nn.Module
    normed: Tensor | None
    mixing: kernels.Mixing


def are_unchanged(now: Tensor, then: Tensor, version: int) -> bool:
    """Whether `now` is the memory of `then`, which had this version, and neither has changed."""
    return (
        now.data_ptr() == then.data_ptr()
        and now.numel() == then.numel()
        # a viewless copy, which Megatron makes between layers, counts its own changes from 0
        and then._version == version
        and now._version in (0, version)
    )


def _outside_the_graph(tensor: Tensor) -> Tensor:
    # unlike detach(), .data counts its changes apart: refilling it is no change to what was saved
    return tensor.data


class Dropped:
    """One microbatch's tensors of one block: released when it is made, until `rebuild`.

    Raises:
        RuntimeError: a tensor to release is part of a larger storage.
    """

    def __init__(self, passed: Sequence[RecomputeRecord], backend: str) -> None:
        self._backend = backend
        self._start = _outside_the_graph(passed[0].x)
        self._ys = [_outside_the_graph(p.x) for p in passed[1:]]
        self._us = [_outside_the_graph(p.u) for p in passed]
        self._h_pre = [p.h_pre for p in passed]
        self._mixings = [p.mixing.detach() for p in passed[:-1]]
        self._norms = [
            (_outside_the_graph(p.normed), u, p.norm)
            for p, u in zip(passed, self._us, strict=True)
            if p.normed is not None
        ]
        self.is_rebuilt = False
        for tensor in self._dropped():
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                raise RuntimeError(
                    f"a tensor of {tensor.nbytes} bytes to release lies in a storage of"
                    f" {tensor.untyped_storage().nbytes()}: a norm returned a part of a larger"
                    " tensor, which recompute cannot release; turn --mhc-recompute off"
                )
        for tensor in self._dropped():
            tensor.untyped_storage().resize_(0)

    def _dropped(self) -> list[Tensor]:
        return [*self._ys, *self._us, *(normed for normed, _, _ in self._norms)]

    @torch.no_grad()
    def rebuild(self) -> None:
        """Give every tensor its storage and values back, on the current stream; once is enough."""
        if self.is_rebuilt:
            return
        for tensor in self._dropped():
            tensor.untyped_storage().resize_(tensor.nbytes)
        kernels.rebuild(
            self._start,
            self._h_pre,
            self._mixings,
            ys=self._ys,
            us=self._us,
            backend=self._backend,
        )
        for normed, u, norm in self._norms:
            # with gradients on, as in the forward: a norm may have a kernel of its own without
            with torch.enable_grad():
                again = norm.forward(u.detach().requires_grad_())
            normed.copy_(again.detach())
        self.is_rebuilt = True
        # what autograd still needs it holds itself, and frees as it goes
        self._ys, self._us, self._norms, self._mixings, self._h_pre = [], [], [], [], []
        del self._start


class Block:
    """Consecutive layers of a model chunk that drop and rebuild their streams together.

    Args:
        layers: how many may join.
        backend: as `MHCConfig.backend`.
    """

    def __init__(self, layers: int, backend: str) -> None:
        self._layers = layers
        self._backend = backend
        self._sites: list[object] = []
        self._passed: list[RecomputeRecord] = []
        self._written: tuple[Tensor, int] | None = None
        # held by the graphs alone: a graph that is gone takes its microbatch off this list
        self._microbatches: list[weakref.ref[Dropped]] = []

    @property
    def sites(self) -> tuple[object, ...]:
        """The sites that have joined, in their order."""
        return tuple(self._sites)

    def has_room(self) -> bool:
        """Whether another layer may join."""
        return len(self._sites) < 2 * self._layers

    def join(self, *sites: object) -> None:
        """Add the sites of the next layer."""
        self._sites.extend(sites)

    def forget(self) -> None:
        """Let go of a forward that an exception ended in this block."""
        self._passed, self._written = [], None

    def passed(self, site: object, passed: RecomputeRecord, streams: Tensor) -> None:
        """A site has read and written; `streams` [s, b, n*C] is what it wrote.

        Raises:
            RuntimeError: it read other streams than the site before it in the block wrote.
        """
        if site is self._sites[0]:
            self.forget()  # a forward that was given up between two layers
        elif self._written is None or not are_unchanged(passed.x, *self._written):
            raise RuntimeError(
                "inside a recompute block a site read other streams than the site before wrote:"
                " something between the layers replaced them; turn --mhc-recompute off"
            )
        self._passed.append(passed)
        self._written = (streams.detach(), streams._version)
        if site is self._sites[-1]:
            self._written = None
            self._drop(streams)

    def _drop(self, streams: Tensor) -> None:
        """Release the block that ends with these streams, if a backward may come for it."""
        passed, self._passed = self._passed, []
        if streams.grad_fn is None or len(passed) != len(self._sites):
            return
        dropped = Dropped(passed, self._backend)
        # every path of the backward into the block leads through this node
        streams.grad_fn.register_prehook(lambda _: dropped.rebuild())
        self._microbatches.append(weakref.ref(dropped))

    def rebuild_oldest(self) -> bool:
        """Rebuild what the oldest microbatch dropped here; whether there was one."""
        self._microbatches = [
            reference
            for reference in self._microbatches
            if (dropped := reference()) is not None and not dropped.is_rebuilt
        ]
        if not self._microbatches:
            return False
        dropped = self._microbatches.pop(0)()
        if dropped is not None:
            dropped.rebuild()
        return dropped is not None


_LAST_BLOCK = "mhc_last_block"


def _last_block(chunk: torch.nn.Module) -> Block | None:
    """The block whose backward comes first; its module is looked for once and known by name."""
    kept = vars(chunk)
    if _LAST_BLOCK in kept:
        if kept[_LAST_BLOCK] is None:
            return None
        with contextlib.suppress(AttributeError):  # a layer that was dropped from the model
            return getattr(chunk.get_submodule(kept[_LAST_BLOCK]), "recompute_block", None)
    names = [n for n, m in chunk.named_modules() if getattr(m, "recompute_block", None)]
    kept[_LAST_BLOCK] = names[-1] if names else None
    return _last_block(chunk)


def rebuild_ahead(chunk: torch.nn.Module) -> bool:
    """Rebuild the last block of a model chunk for the microbatch whose backward comes next.

    The rebuild needs no gradient, so a schedule can do it while it waits for one. Call it on the
    stream that the backward runs on. It is never needed: the backward rebuilds what is not.

    Args:
        chunk: a model chunk, wrapped or not; it has one block's streams more in memory afterwards.

    Returns:
        Whether there was something to rebuild (not without recompute, nor when done already).
    """
    last = _last_block(chunk)
    return last is not None and last.rebuild_oldest()
