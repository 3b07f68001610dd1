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

Finish = Callable[[Tensor], Tensor]
"""What is done to a block's output."""


def take_one_stream(block: Any, has_one: bool) -> None:
    """Where `has_one`, leave of the message [s, b, n*C] that came in the one stream [s, b, C]."""
    message = block.input_tensor
    if has_one and message is not None:
        block.input_tensor = message[..., : block.config.hidden_size].contiguous()


def one_stream_as_message(config: Any) -> Finish:
    """One stream [s, b, C] -> the message [s, b, n*C] of a model with this configuration."""
    width = message_width(config)
    assert width is not None
    return lambda stream: pad(stream, (0, width - stream.shape[-1]))
