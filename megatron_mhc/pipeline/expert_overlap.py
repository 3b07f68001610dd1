"""`--overlap-moe-expert-parallel-comm`: the MLP's post/res beside both of its streams.

Megatron's schedule puts a layer's all-to-alls on a communication stream, beside another
microbatch's layer on the compute stream. Where the residual was added, behind the combine, mHC
mixes n streams: on the communication stream the next all-to-all would wait for that, on the compute
stream the other microbatch would. So it has a high-priority stream of its own (paper 4.3.3):

    communication  ... [ combine 1 ] [ dispatch 2 ] ...
    priority                        [ post/res 1 ]
    compute        ... [  MLP 2    ] [ attention 2' ] ...  [ attention 1 of the next layer ]

Its backward runs there too: autograd runs an operation's backward on its forward's stream.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import nvtx_decorator
from torch import Tensor

from megatron_mhc.model.arrange import arrange
from megatron_mhc.model.layer import MHCLayer
from megatron_mhc.model.site import INLINE, Inline

from .side_streams import record_use
from .state import state_of


class Handover(Inline):
    """From the last site of a layer to the first of the next one, over a stream beside both.

    Args:
        stream: the CUDA stream that the first one's work runs on.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._written: Any = None

    @nvtx_decorator(message="mhc.post")
    def run_detached[T](self, work: Callable[..., T], *inputs: Any) -> T:
        """`work(*inputs)` beside the current stream, which does not wait for the result."""
        self._stream.wait_stream(torch.cuda.current_stream())
        record_use(inputs, self._stream)
        with torch.cuda.stream(self._stream):
            result = work(*inputs)
            self._written = self._stream.record_event()
        return result

    def run_and_join[T](self, work: Callable[..., T], streams: Tensor) -> T:
        """`work(streams)` on the current stream, once the streams are written."""
        current = torch.cuda.current_stream()
        if self._written is not None:
            current.wait_event(self._written)
            self._written = None
        record_use(streams, current)
        return work(streams)


def hand_over(layers: Sequence[MHCLayer], stream: Callable[[], Any]) -> None:
    """Let each MoE layer hand its streams to the next layer over a CUDA stream beside both.

    Args:
        layers: those of a model chunk, in their order.
        stream: returns the CUDA stream; asked for where a handover is made.
    """
    for layer, after in itertools.pairwise(layers):
        ours, theirs = layer.mlp_site, after.attention_site
        is_set = ours.side_streams is not INLINE and ours.side_streams is theirs.side_streams
        if isinstance(layer.mlp, MoELayer) and not is_set:
            ours.side_streams = theirs.side_streams = Handover(stream())
    if layers:  # whose reader is no site: the final norm, a message or multi-token prediction
        layers[-1].mlp_site.side_streams = INLINE


def prepare(model: Any) -> None:
    """What a GPTModel's layers need before a schedule of their nodes is built.

    Args:
        model: a GPTModel; one without mHC stays as it is.
    """
    arrange(model.decoder)
    layers = [layer for layer in model.decoder.layers if isinstance(layer, MHCLayer)]
    hand_over(layers, state_of(model).post_stream)
