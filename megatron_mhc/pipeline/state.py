"""What a model's pipeline keeps between steps: one `PipelineState` a model."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from megatron_mhc.model.recompute import Block

from .side_streams import SideStreams


@dataclasses.dataclass(eq=False)
class PipelineState:
    """Of a model, known by its first chunk on this rank.

    Attributes:
        has_sites: whether it has mHC, as its stages agreed before the first training step (False)
            and before the first evaluation (True).
        kinds_begun: which of the two has had its first step.
        side_streams: the CUDA streams of its ends, the same in every step: each has a part of the
            allocator's memory to itself, which new ones would not find.
    """

    has_sites: dict[bool, bool] = dataclasses.field(default_factory=dict)
    kinds_begun: set[bool] = dataclasses.field(default_factory=set)
    side_streams: SideStreams | None = None
    _post_stream: Any = None
    _last: str | None = None
    _is_last_known: bool = False

    def side_streams_of(self, chunks: Sequence[torch.nn.Module], in_flight: int) -> SideStreams:
        """`side_streams`, made when first asked for."""
        if self.side_streams is None:
            self.side_streams = SideStreams(in_flight, chunks)
        return self.side_streams

    def post_stream(self) -> Any:
        """The high-priority CUDA stream of the post/res of MLPs, made when first asked for."""
        if self._post_stream is None:
            self._post_stream = torch.cuda.Stream(priority=-1)
        return self._post_stream

    def last_block(self, chunk: torch.nn.Module) -> Block | None:
        """The recompute block whose backward comes first: looked for once, then known by name.

        A walk over a deep model's modules would cost every backward milliseconds.
        """
        if self._is_last_known:
            if self._last is None:
                return None
            with contextlib.suppress(AttributeError):  # a layer that was dropped from the model
                return _block_of(chunk.get_submodule(self._last))
        names = [name for name, module in chunk.named_modules() if _block_of(module) is not None]
        self._last, self._is_last_known = (names[-1] if names else None), True
        return self.last_block(chunk)


def _block_of(module: Any) -> Block | None:
    """The recompute block of a layer with mHC; None for any other module."""
    return getattr(module, "recompute_block", None)


_STATE = "mhc_pipeline_state"


def state_of(chunk: Any) -> PipelineState:
    """The state of the model whose first chunk on this rank this is, wrapped or not.

    It is kept on the chunk: through the gradients' places of `side_streams` it reaches the model,
    and a table of states, however weak its keys, would hold every model for ever.
    """
    kept: PipelineState = vars(chunk).setdefault(_STATE, PipelineState())
    return kept


def rebuild_ahead(chunk: torch.nn.Module) -> bool:
    """Rebuild the last block of a model chunk for the microbatch whose backward comes next.

    The rebuild needs no gradient, so a schedule can do it while it waits for one. Call it on the
    stream that the backward runs on. It is never needed: the backward rebuilds what is not.

    Args:
        chunk: a model chunk, wrapped or not; it has one block's streams more in memory afterwards.

    Returns:
        Whether there was something to rebuild (not without recompute, nor when done already).
    """
    last = state_of(chunk).last_block(chunk)
    return last is not None and last.rebuild_oldest()
