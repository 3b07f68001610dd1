"""Pipeline stages without layers: the embedding alone, or the loss (and multi-token prediction).

Megatron's schedules know one shape for all links of a pipeline, that of the streams. In front of
the model's first layer and behind its last one there is one stream, which then travels in a message
of n: the rest of it is zeros, and so is the rest of its gradient.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from .config_marks import message_width
from .site import INLINE, Inline

Finish = Callable[[Tensor], Tensor]
"""What is done to a block's output."""

_SIDE_STREAMS = "mhc_side_streams"


def set_side_streams(block: Any, side_streams: Inline) -> None:
    """Where a block takes one stream from a message, and makes a message of one."""
    setattr(block, _SIDE_STREAMS, side_streams)


def _side_streams(block: Any) -> Inline:
    side_streams: Inline = getattr(block, _SIDE_STREAMS, INLINE)
    return side_streams


def take_one_stream(block: Any) -> None:
    """Leave of the message [s, b, n*C] that came in the one stream [s, b, C]."""
    width, message = block.config.hidden_size, block.input_tensor

    def first(streams: Tensor) -> Tensor:
        return streams[..., :width].contiguous()

    if message is not None:
        block.input_tensor = _side_streams(block).run_and_join(first, message)


def one_stream_as_message(block: Any) -> Finish:
    """One stream [s, b, C] -> the message [s, b, n*C] of this block's model."""
    width = message_width(block.config)
    assert width is not None

    def widened(stream: Tensor) -> Tensor:
        return pad(stream, (0, width - stream.shape[-1]))

    return lambda stream: _side_streams(block).run_detached(widened, stream)


def message_as_it_is(block: Any) -> Finish:
    """A message that came in goes out: it leaves from where the others do."""
    return lambda message: _side_streams(block).run_detached(lambda it: it, message)
