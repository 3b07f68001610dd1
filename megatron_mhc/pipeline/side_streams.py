"""High-priority CUDA streams beside the compute stream, for the ends of a pipeline stage.

Autograd runs an operation's backward on the stream that its forward ran on, and orders the streams
of neighbouring operations by itself. So what `run_detached` puts on a high-priority stream has its
backward there too, beside whatever the compute stream does meanwhile. Order is kept by events
alone.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import torch
from megatron.core.utils import nvtx_decorator
from torch import Tensor

from megatron_mhc.model.site import Inline


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple):
        for value in values:
            yield from _tensors(value)


def record_use(values: Any, stream: Any) -> None:
    """Tell the allocator that `stream` uses these tensors: their memory outlives its work so far.

    Args:
        values: tensors, or tuples of them; anything else in a tuple is left alone.
    """
    for tensor in _tensors(values):
        tensor.record_stream(stream)


class SideStreams(Inline):
    """High-priority streams that the microbatches of a stage take by turns.

    A stream does its work in order. With one for all, a microbatch's work would stand behind that
    of another one that still waits for its link; by turns, those that meet are on different ones.

    Args:
        in_flight: how many microbatches the stage holds between their forward and their backward,
            beside the one that it works on: the number of its warm-up microbatches.
        chunks: the model chunks whose ends work here.

    Attributes:
        microbatch: the one whose stream `run_detached` and `run_and_join` use.
        arrived: the residual streams [s, b, n*C] whose receive that CUDA stream has waited for
            already; None where nothing was received.
    """

    def __init__(self, in_flight: int, chunks: Iterable[torch.nn.Module]) -> None:
        self._streams = [torch.cuda.Stream(priority=-1) for _ in range(_turns(in_flight))]
        # Gradients are added up on the stream that was current when autograd made the place for it.
        # Made here, and kept, that is the compute stream, whichever stream first reads a parameter
        # (Megatron's DistributedDataParallel does the same, for its hooks).
        with torch.enable_grad():
            self._accumulators = [
                parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
                for chunk in chunks
                for parameter in chunk.parameters()
                if parameter.requires_grad
            ]
        self.microbatch = 0
        self.arrived: Tensor | None = None

    def of(self, microbatch: int) -> Any:
        """The stream of a microbatch."""
        return self._streams[microbatch % len(self._streams)]

    @nvtx_decorator(message="mhc.side_stream")
    def run_detached[T](self, work: Callable[..., T], *inputs: Any) -> T:
        """`work(*inputs)` on the microbatch's stream, behind the compute stream's work so far.

        The compute stream does not wait for the result: whoever reads it there waits for `of`.
        """
        stream = self.of(self.microbatch)
        stream.wait_stream(torch.cuda.current_stream())
        record_use(inputs, stream)
        with torch.cuda.stream(stream):
            return work(*inputs)

    @nvtx_decorator(message="mhc.side_stream")
    def run_and_join[T](self, work: Callable[..., T], streams: Tensor) -> T:
        """`work(streams)` on this microbatch's stream, for the compute stream to go on with.

        What has `arrived` is worked on at once: nothing of the compute stream stands in front.
        """
        stream, compute = self.of(self.microbatch), torch.cuda.current_stream()
        if streams is not self.arrived:
            stream.wait_stream(compute)
        self.arrived = None
        record_use(streams, stream)
        with torch.cuda.stream(stream):
            result = work(streams)
        compute.wait_stream(stream)
        record_use((streams, result), compute)
        return result

    def begin(self) -> None:
        """Start behind the compute stream: parameters, say, are what its last step left."""
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream())

    def end(self) -> None:
        """Let the compute stream wait for all that was done here."""
        for stream in self._streams:
            torch.cuda.current_stream().wait_stream(stream)


def _turns(in_flight: int) -> int:
    """How many streams keep a microbatch apart from the one in front of it and the oldest two.

    After forward i of a stage with w in flight comes backward i - w, and then forward i + 1.
    """
    apart = {1, in_flight, in_flight + 1} - {0}
    return next(turns for turns in count(2) if all(step % turns for step in apart))
