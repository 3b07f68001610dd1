"""A site: how a sublayer of a Transformer layer reads n streams and writes to them.

    norm slot      streams -> u = H_pre streams -> norm(u)  and a `Residual`    (`Site.read`)
    sublayer       norm(u) -> f
    residual slot  f, `Residual` -> H_res streams + H_post f                    (`Site.write`)

Megatron lets a norm return `(output, residual)` and hands that residual to the residual slot. So
the streams and the coefficients travel with the data. Nothing is kept here between the two slots:
a checkpoint, a CUDA graph or a node of a schedule may stand around either of them.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.utils import make_viewless_tensor, nvtx_decorator
from torch import Tensor

from megatron_mhc import kernels

from .columns import STREAMS_ALONE, extra_columns, join, part
from .connection import HyperConnection, SiteInput
from .recompute import Block, RecomputeRecord, are_unchanged


class Residual(NamedTuple):
    """What a norm slot hands to the residual slot of its sublayer, where Megatron has one tensor.

    A tuple of tensors: what takes it apart (a CUDA graph, a node of a schedule) sees each of them.

    Attributes:
        streams: [s, b, n*C], which the site read.
        h_post: [s, b, n], fp32.
        h_res: [s, b, n, n] (destination, source), fp32.
        for_rebuild: under selective recompute H_pre [s, b, n], u [s, b, C], and norm(u) where that
            is another tensor than u; else nothing.
        next_pre: of a delayed site H_pre [s, b, n], which the next one reads with; else nothing.
    """

    streams: Tensor
    h_post: Tensor
    h_res: Tensor
    for_rebuild: tuple[Tensor, ...] = ()
    next_pre: tuple[Tensor, ...] = ()

    def record_stream(self, stream: Any) -> None:
        """Tell the allocator that `stream` uses every one of these (as `Tensor.record_stream`)."""
        for tensor in (*self[:3], *self.for_rebuild, *self.next_pre):
            tensor.record_stream(stream)


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


def _graph_where(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Megatron turns gradients on around residual slots in evaluation too, which wants no graph."""
    if wanted == torch.is_grad_enabled():
        return _AS_IT_IS
    return torch.set_grad_enabled(wanted)


_AS_IT_IS = contextlib.nullcontext()


class _Ahead(NamedTuple):
    """What the site before has computed for this one: its streams [s, b, n*C] and its input."""

    streams: Tensor
    version: int
    region: tuple[bool, Any]
    site_input: SiteInput

    def is_of(self, streams: Tensor) -> bool:
        """Whether these are the same streams, unchanged (`self` keeps their memory from reuse),
        read in the autograd region in which they were written."""
        unchanged = are_unchanged(streams, self.streams, self.version)
        return unchanged and self.region == _autograd_region()


class Site:
    """What fills the norm slot and the residual slot of one sublayer.

    Where `following` names the next site, `write` computes that one's input too, in one pass over
    the streams, and leaves it there; the next `read` takes it if the streams are the same. Set it
    only where no checkpoint, CUDA graph or schedule node begins or ends in between (`arrange`):
    across a checkpoint the value would have no gradient, across a graph it would be stale.

    Args:
        connection: the site's parameters.
        norm: the module in the norm slot. Its `forward` is replaced on the instance: class, hooks
            and checkpoint keys stay.

    Attributes:
        is_entry: whether one stream comes in, to be replicated.
        contract: what makes one stream of n behind `write` (of streams [s, b, n, C], and H_pre
            where sites are delayed); None inside the model.
        block: where what the site read is dropped after the forward; None without recompute.
        side_streams: at the ends of a pipeline stage, CUDA streams for this site's work.
    """

    def __init__(self, connection: HyperConnection, norm: torch.nn.Module) -> None:
        self.connection = connection
        self.is_entry = False
        self.contract: Callable[..., Tensor] | None = None
        self.following: Site | None = None
        self.block: Block | None = None
        self.side_streams: Inline = INLINE
        self._norm = norm.forward
        self._ahead: _Ahead | None = None
        norm.forward = self.read
        # what Megatron asks of a norm from 0.20 on
        norm.returns_residual = True  # type: ignore[assignment]

    @nvtx_decorator(message="mhc.read")
    def read(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Residual]:
        """The norm slot: streams [s, b, n*C], or one stream [s, b, C] at the model's entry; a
        delayed site has H_pre behind the streams where the site before has not read for it.

        Returns:
            norm(u) [s, b, C], and the residual for `write`.

        Raises:
            ValueError: the streams do not have n*C channels.
            RuntimeError: the norm returns a residual of its own.
        """
        streams = hidden_states
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.is_of(streams):
            _, u, h_post, h_res, h_pre, next_pre = ahead.site_input
        else:
            streams = self._replicated_at_entry(streams)
            site_input = self.side_streams.run_and_join(self._site_input, streams)
            streams, u, h_post, h_res, h_pre, next_pre = site_input
        later = () if next_pre is None else (next_pre,)
        normed = self._norm(u, *args, **kwargs)
        if not isinstance(normed, Tensor):
            raise RuntimeError(
                f"the norm of a site returned {type(normed).__name__}, not a tensor: a norm that"
                " returns a residual too cannot stand here, give the spec one that returns a tensor"
            )
        if h_pre is None:
            return normed, Residual(streams, h_post, h_res, (), later)
        is_u = normed.data_ptr() == u.data_ptr()
        for_rebuild = (h_pre, u) if is_u else (h_pre, u, normed)
        return normed, Residual(streams, h_post, h_res, for_rebuild, later)

    def _site_input(self, streams: Tensor) -> SiteInput:
        """What this site's connection makes of streams, with the H_pre behind them where it is
        delayed; of the model's entry, of stream 0 alone."""
        if not self.connection.mhc.delayed:
            return self.connection(streams)
        n, width = self.connection.mhc.num_streams, self.connection.hidden_size
        if not self.is_entry:
            streams, h_pre = part(streams, n * width)
        else:
            dtype = kernels.reference.accumulation_dtype(streams)
            h_pre = streams.new_zeros(*streams.shape[:-1], n, dtype=dtype)
            h_pre[..., 0] = 1.0
        return self.connection(streams, None, h_pre)

    def _replicated_at_entry(self, hidden_states: Tensor) -> Tensor:
        """The streams [s, b, n*C] of what comes in."""
        mhc, width = self.connection.mhc, self.connection.hidden_size
        n, extra = mhc.num_streams, extra_columns(mhc, hidden_states.dtype)
        expected = width if self.is_entry else n * width + extra
        if hidden_states.shape[-1] != expected:
            what = (
                f"{n} streams of {width}{f' and {extra} columns of H_pre' * (extra > 0)} ="
                f" {expected}"
                if not self.is_entry
                else f"one stream of {width}"
            )
            if extra and hidden_states.shape[-1] == n * width:
                raise RuntimeError(STREAMS_ALONE)
            raise ValueError(
                f"a site got hidden states of width {hidden_states.shape[-1]}; expected {what}"
                " channels: give with_mhc the spec of all layers, and change no stream between two"
            )
        return hidden_states.repeat(1, 1, n) if self.is_entry else hidden_states

    def write(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """The residual slot, called as Megatron calls `get_bias_dropout_add`."""
        return partial(self._write, training)

    @nvtx_decorator(message="mhc.write")
    def _write(
        self,
        training: bool,
        output_with_bias: tuple[Tensor, Tensor | None],
        residual: Residual,
        dropout: float,
    ) -> Tensor:
        """(f, bias), the residual and F's dropout -> the next streams [s, b, n*C], or one stream.

        Raises:
            RuntimeError: the residual is not the norm slot's, or only F has a graph.
        """
        f, bias = output_with_bias
        if not isinstance(residual, Residual):
            raise RuntimeError(
                f"a residual slot got {type(residual).__name__}, not what its norm slot returned:"
                " something between the two (a norm that returns its own residual, offloading)"
                " replaced it; turn that off"
            )
        has_graph = residual.h_post.requires_grad
        if f.requires_grad and not has_graph:
            self._check_that_none_is_lost(residual)
        with _graph_where(has_graph or f.requires_grad):
            if training and dropout > 0:
                f = torch.nn.functional.dropout(f if bias is None else f + bias, dropout)
                bias = None
            streams = self._mix(residual, kernels.Mixing(f, residual.h_post, residual.h_res, bias))
            if self.contract is None:
                return streams
            apart = streams.unflatten(-1, (self.connection.mhc.num_streams, -1))
            return self.contract(apart, *residual.next_pre)

    def _check_that_none_is_lost(self, residual: Residual) -> None:
        """F has a graph and the norm slot had none: well where nothing in it wants a gradient."""
        wanted = (residual.streams, *self.connection.parameters())
        if any(tensor.requires_grad for tensor in wanted):
            raise RuntimeError(
                "a norm slot ran without a graph and its sublayer with one: a checkpoint around"
                " the norm alone would lose the streams' gradient; put it around the sublayer,"
                " or around the whole layer"
            )

    def _mix(self, residual: Residual, mixing: kernels.Mixing) -> Tensor:
        """The next streams [s, b, n*C]; with them the next site's input, where that is fused."""
        x = residual.streams
        # an inference tensor does not tell whether somebody has changed it before the next site
        if self.following is None or torch.is_inference_mode_enabled():
            streams = self.side_streams.run_detached(self._combine, x, *mixing, *residual.next_pre)
        else:
            # through the next connection's __call__: only then are its parameters sure to be there
            site_input = self.following.connection(x, mixing, *residual.next_pre)
            streams = site_input.x
            region = _autograd_region()
            self.following._ahead = _Ahead(streams, streams._version, region, site_input)
        if self.block is not None and residual.for_rebuild and mixing.h_post.requires_grad:
            h_pre, u, *other = residual.for_rebuild
            normed = other[0] if other else None
            record = RecomputeRecord(x, u, h_pre, self._norm, normed, mixing)
            self.block.passed(self, record, streams)
        return streams

    def _combine(
        self,
        x: Tensor,
        f: Tensor,
        h_post: Tensor,
        h_res: Tensor,
        f_bias: Tensor | None,
        next_pre: Tensor | None = None,
    ) -> Tensor:
        """The next streams [s, b, n*C], H_pre behind them where the next site reads with it. No
        view: a stage that sent them frees their memory."""
        y = kernels.combine(x, f, h_post, h_res, f_bias, backend=self.connection.mhc.backend)
        if next_pre is not None and self.contract is None:
            return join(y, next_pre)
        return make_viewless_tensor(y, requires_grad=y.requires_grad, keep_graph=True)

    def forget(self) -> None:
        """Let go of a forward that an exception ended: its graph would live until the next one."""
        self._ahead = None
        if self.following is not None:
            self.following._ahead = None
        if self.block is not None:
            self.block.forget()
