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

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from megatron.core.utils import nvtx_decorator
from torch import Tensor

from megatron_mhc import kernels


class RecomputeRecord(NamedTuple):
    """What a site that has read and written hands to its block.

    Attributes:
        x: the streams [..., n*C] that it read; u: [..., C]; h_pre: [..., n].
        norm, normed: what makes norm(u), and norm(u) where that is not u itself.
        mixing: what it wrote with.
    """

    x: Tensor
    u: Tensor
    h_pre: Tensor
    norm: Callable[..., Tensor]
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

    def __init__(self, records: Sequence[RecomputeRecord], backend: str) -> None:
        self._backend = backend
        self._start = _outside_the_graph(records[0].x)
        self._ys = [_outside_the_graph(r.x) for r in records[1:]]
        self._us = [_outside_the_graph(r.u) for r in records]
        self._h_pre = [r.h_pre for r in records]
        self._mixings = [r.mixing.detach() for r in records[:-1]]
        self._norms = [
            (_outside_the_graph(r.normed), u, r.norm)
            for r, u in zip(records, self._us, strict=True)
            if r.normed is not None
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

    @nvtx_decorator(message="mhc.rebuild")
    @torch.no_grad()
    def rebuild(self) -> None:
        """Give every tensor its storage and values back, on the current stream; once is enough."""
        if self.is_rebuilt:
            return
        for tensor in self._dropped():
            tensor.untyped_storage().resize_(tensor.nbytes)
        n = self._h_pre[0].shape[-1]
        start, *ys = (x.view(*x.shape[:-1], n, -1) for x in (self._start, *self._ys))
        kept = (self._h_pre, self._mixings)
        kernels.rebuild(start, *kept, ys=ys, us=self._us, backend=self._backend)
        for normed, u, norm in self._norms:
            # with gradients on, as in the forward: a norm may have a kernel of its own without
            with torch.enable_grad():
                again = norm(u.detach().requires_grad_())
            normed.copy_(again.detach())
        self.is_rebuilt = True
        # what autograd still needs it holds itself, and frees as it goes
        self._ys, self._us, self._norms, self._mixings, self._h_pre = [], [], [], [], []
        del self._start


class Block:
    """Sites of consecutive layers of a model chunk that drop and rebuild their streams together.

    Args:
        sites: in the order in which they run.
        backend: as `MHCConfig.backend`.
    """

    def __init__(self, sites: Sequence[object], backend: str) -> None:
        self.sites = tuple(sites)
        self._backend = backend
        self._records: list[RecomputeRecord] = []
        self._written: tuple[Tensor, int] | None = None
        # held by the graphs alone: a graph that is gone takes its microbatch off this list
        self._microbatches: list[weakref.ref[Dropped]] = []

    def forget(self) -> None:
        """Let go of a forward that an exception ended in this block."""
        self._records, self._written = [], None

    def passed(self, site: object, record: RecomputeRecord, streams: Tensor) -> None:
        """A site has read and written; `streams` [s, b, n*C] is what it wrote.

        Raises:
            RuntimeError: it read other streams than the site before it in the block wrote.
        """
        if site is self.sites[0]:
            self.forget()  # a forward that was given up between two layers
        elif self._written is None or not are_unchanged(record.x, *self._written):
            raise RuntimeError(
                "inside a recompute block a site read other streams than the site before wrote:"
                " something between the layers replaced them; turn --mhc-recompute off"
            )
        self._records.append(record)
        self._written = (streams.detach(), streams._version)
        if site is self.sites[-1]:
            self._written = None
            self._drop(streams)

    def _drop(self, streams: Tensor) -> None:
        """Release the block that ends with these streams, if a backward may come for it."""
        records, self._records = self._records, []
        if streams.grad_fn is None or len(records) != len(self.sites):
            return
        dropped = Dropped(records, self._backend)
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
