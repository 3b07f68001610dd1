"""A patch of Megatron's pipeline communication: stages exchange n streams, [s, b, n*C] and what may
stand behind them, instead of [s, b, C].

Both schedules (1F1B and interleaved) take the width from `config.hidden_size` and hand it to
`P2PCommunicator`, whose `_communicate` makes the tensors that are received: the one place for both.
"""

import functools
from collections.abc import Callable
from typing import Any

from .registry import Patch


def pipeline_width_patch(width_of: Callable[[Any], int | None]) -> Patch:
    """`width_of(config)` says how many channels stages of this configuration exchange; None for an
    ordinary model."""

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _communicate(self: Any, *, tensor_shape: Any, **kwargs: Any) -> Any:
            width = width_of(self.config)
            # where stages tell each other their shapes, there is nothing to widen
            if width is not None and not self.config.variable_seq_lengths:
                if tensor_shape:
                    tensor_shape = (*tensor_shape[:-1], width)
                for name in ("tensor_send_next", "tensor_send_prev"):
                    _check_sent(name, kwargs.get(name), tensor_shape, width)
            return original(self, tensor_shape=tensor_shape, **kwargs)

        return _communicate

    return Patch(
        id="pipeline-width",
        target="megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate",
        replace=replace,
        why="pipeline stages exchange n streams",
    )


def _check_sent(name: str, tensor: Any, wanted: Any, width: int) -> None:
    """Backends compare bytes, not shapes: another shape would arrive as nonsense, or hang.

    Args:
        name, tensor: the argument of `_communicate`; None if nothing is sent.
        wanted: the shape that is received in return, which a plain send has none of (None).
        width: of all streams together.

    Raises:
        ValueError: the tensor to send has another shape than the receiver makes room for.
    """
    if tensor is None:
        return
    wanted = wanted or (*tensor.shape[:-1], width)
    if tuple(tensor.shape) != wanted:
        raise ValueError(
            f"a pipeline stage is about to send {name} of shape {tuple(tensor.shape)} and the next"
            f" one expects {wanted} (sequence, micro-batch, streams times hidden size): start all"
            " stages with the same sizes and --mhc flags, and put with_mhc around all layers"
        )
