"""What a site of a layer does: read the streams, write to them, and what is fused or dropped.

A sublayer's norm slot and its residual slot share a `Site`. `read` stands in front of the norm,
`write` where the residual was added.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_mhc import kernels

from .connection import HyperConnection, SiteInput
from .recompute import Block, RecomputeRecord, are_unchanged


class Inline:
    """Where a site works on the streams: at once, on the CUDA stream that is current.

    `pipeline.side_streams.SideStreams` takes its place at the ends of a pipeline stage.
    """

    def run_detached[T](self, work: Callable[..., T], *inputs: Any) -> T:
        """`work(*inputs)`, whose result nothing else on the current stream reads."""
        return work(*inputs)

    def run_and_join[T](self, work: Callable[..., T], streams: Tensor) -> T:
        """`work(streams)`, for the current stream to go on with."""
        return work(streams)


INLINE = Inline()


def _autograd_region() -> tuple[bool, Any]:
    """Whether a graph is recorded here, and the innermost hooks on what it saves.

    A layer under a checkpoint is a region of its own: one without a graph, that is run again for
    its gradient (reentrant), or one whose saved tensors are (hooks). What is computed in one region
    and read in another loses its gradient, or is not there when the region runs again.
    """
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(False)


class _Ahead(NamedTuple):
    """What the site before has computed for this one: its streams [s, b, n*C] and its `pre`."""

    streams: Tensor
    version: int
    region: tuple[bool, Any]
    begun: SiteInput

    def is_of(self, streams: Tensor) -> bool:
        """Whether these are the same streams, unchanged (`self` keeps their memory from reuse),
        read in the autograd region in which they were written."""
        unchanged = are_unchanged(streams, self.streams, self.version)
        return unchanged and self.region == _autograd_region()


class _Pending(NamedTuple):
    """What a site has read and its `write` waits for; norm(u) joins when the norm has run."""

    streams: Tensor
    begun: SiteInput
    norm: torch.nn.Module
    has_graph: bool
    normed: Tensor | None = None


class Site:
    """What a sublayer's norm slot and residual slot share: a connection and the streams it read.

    Where `following` names the next site, `write` computes that one's `pre` too, in one pass over
    the streams, and leaves it there; `read` of the next site takes it if the streams are the same.
    `block` is where what the site read is dropped after the forward, None without recompute.

    At the ends of a pipeline stage `side_streams` may be CUDA streams beside the compute stream:
    the first site's `pre` and the last one's `combine` then run there, and so do their gradients.
    """

    def __init__(self, connection: HyperConnection) -> None:
        self.connection = connection
        self.following: Site | None = None
        self.side_streams: Inline = INLINE
        self.block: Block | None = None
        self._pending: _Pending | None = None
        self._ahead: _Ahead | None = None

    def read(self, norm: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook of the norm slot: streams [s, b, n*C] become u [s, b, C].

        Raises:
            ValueError: the streams do not have n*C channels.
        """
        streams, *rest = inputs
        n, width = self.connection.mhc.num_streams, self.connection.hidden_size
        if streams.shape[-1] != n * width:
            raise ValueError(
                f"a site got hidden states of width {streams.shape[-1]}; expected"
                f" {n} streams of {width} = {n * width} channels"
            )
        ahead, self._ahead = self._ahead, None
        x = streams.unflatten(-1, (n, width))
        if ahead is not None and ahead.is_of(streams):
            begun = ahead.begun._replace(x=x)
        else:
            begun = self.side_streams.run_and_join(self._pre, streams)
        self._pending = _Pending(streams, begun, norm, torch.is_grad_enabled())
        return (begun.u, *rest)

    def keep_normed(self, norm: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A forward hook of the norm slot, under recompute: notes norm(u), to be dropped too."""
        pending = self._pending
        is_tensor = isinstance(output, Tensor)  # `write` refuses what else a norm may return
        if pending is not None and is_tensor and output.data_ptr() != pending.begun.u.data_ptr():
            self._pending = pending._replace(normed=output)

    def forget(self) -> None:
        """Let go of a forward that an exception ended: its graph would live until the next one."""
        self._pending = self._ahead = None
        if self.following is not None:
            self.following._ahead = None
        if self.block is not None:
            self.block.forget()

    def _pre(self, streams: Tensor) -> SiteInput:
        """What this site's connection makes of streams that nobody has read for it."""
        n, width = self.connection.mhc.num_streams, self.connection.hidden_size
        return self.connection(streams.unflatten(-1, (n, width)))

    def _combine(self, x: Tensor, *mixing: Any) -> Tensor:
        """The next streams [s, b, n*C], no view: a stage that sent them frees their memory."""
        y = kernels.combine(x, *mixing, backend=self.connection.mhc.backend).flatten(-2)
        return make_viewless_tensor(y, requires_grad=y.requires_grad, keep_graph=True)

    def write(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """The residual slot, called as Megatron calls `get_bias_dropout_add`."""

        def combine(
            output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
        ) -> Tensor:
            """(f, bias), the streams and F's dropout -> the next streams [s, b, n*C].

            Raises:
                RuntimeError: the residual is not the streams that `read` saw, or only F has a
                    graph.
            """
            pending, self._pending = self._pending, None
            if pending is None or pending.streams is not residual:
                raise RuntimeError(
                    "a residual slot got other streams than its norm slot read: something between"
                    " the two (a norm that returns its own residual, offloading) replaced them"
                )
            if output_with_bias[0].requires_grad and not pending.has_graph:
                raise RuntimeError(
                    "a norm slot ran without a graph and its sublayer with one: a checkpoint around"
                    " the norm alone would lose the streams' gradient; put it around the sublayer,"
                    " or around the whole layer"
                )
            # Megatron turns gradients on around this slot even in evaluation, which wants no graph
            with torch.set_grad_enabled(pending.has_graph):
                return self._write(pending, *output_with_bias, dropout if training else 0.0)

        return combine

    def _write(self, pending: _Pending, f: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        x, u, h_post, h_res, h_pre = pending.begun
        if dropout > 0:
            f = f if bias is None else f + bias
            f, bias = torch.nn.functional.dropout(f, dropout), None
        mixing = kernels.Mixing(f, h_post, h_res, bias)
        # an inference tensor does not tell whether somebody has changed it before the next site
        if self.following is None or torch.is_inference_mode_enabled():
            streams = self.side_streams.run_detached(self._combine, x, *mixing)
        else:
            # through the next connection's __call__: only then are its parameters sure to be there
            begun = self.following.connection(x, mixing)
            streams = begun.x.flatten(-2)
            self.following._ahead = _Ahead(streams, streams._version, _autograd_region(), begun)
        if self.block is not None and pending.has_graph and h_pre is not None:
            passed = RecomputeRecord(x, u, h_pre, pending.norm, pending.normed, mixing)
            self.block.passed(self, passed, streams)
        return streams
