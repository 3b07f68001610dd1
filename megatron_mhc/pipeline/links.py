"""What a pipeline stage exchanges with its neighbours, posted early and waited for by streams.

    stage before  --- x -->   this stage   --- y -->   stage behind
                 <-- dx ---               <--- g ---

The directions have a process group each (`connect.two_directions`).
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from .connect import without_timers
from .side_streams import SideStreams, record_use


class Inbox:
    """Receives from one neighbour, posted ahead of their use, in the order of the microbatches.

    Args:
        receive: posts one; returns its tensor and the request to wait for.
        total: how many there will be.
        side_streams: the streams that wait for them.
        ahead: whether `take` posts the one after what it takes; else the caller posts each.
    """

    def __init__(
        self,
        receive: Callable[[], tuple[Tensor, Any]],
        total: int,
        side_streams: SideStreams,
        *,
        ahead: bool = True,
    ) -> None:
        self._receive, self._total, self._side_streams, self.ahead = (
            receive,
            total,
            side_streams,
            ahead,
        )
        self._posted: deque[tuple[Tensor, Any]] = deque()
        self._next = 0

    def post(self) -> None:
        """Make room for the next microbatch's tensor, if there is one to come."""
        if self._next < self._total:
            with torch.cuda.stream(self._side_streams.of(self._next)):
                self._posted.append(self._receive())
            self._next += 1

    def take(self, microbatch: int) -> Tensor:
        """A microbatch's tensor, once its stream has it; the one after it may be posted first."""
        if self.ahead:
            self.post()
        tensor, request = self._posted.popleft()
        with torch.cuda.stream(self._side_streams.of(microbatch)):
            request.wait()
        record_use(tensor, torch.cuda.current_stream())
        return tensor


class Outbox:
    """Sends to one neighbour, each from the stream that made its tensor; nobody waits for them.

    Args:
        send: starts one; returns the request that says when its memory may be used again.
        side_streams: the streams that send.
    """

    def __init__(self, send: Callable[[Tensor], Any], side_streams: SideStreams) -> None:
        self._send, self._side_streams = send, side_streams
        self._sent: tuple[Tensor, Any, int] | None = None

    def put(self, tensor: Tensor, microbatch: int) -> None:
        """Send what the microbatch's stream has made; the caller may give it up at once."""
        self.drain()
        # another tensor of the same memory: Megatron empties the one that it sent
        wire = tensor.detach()
        stream = self._side_streams.of(microbatch)
        record_use(wire, stream)  # full recompute makes a gradient in another one's memory
        with torch.cuda.stream(stream):
            self._sent = wire, self._send(wire), microbatch

    def drain(self) -> None:
        """Let the stream of the last send wait for it, and only then give up its memory."""
        if self._sent is not None:
            wire, request, microbatch = self._sent
            with torch.cuda.stream(self._side_streams.of(microbatch)):
                request.wait()
            self._sent = None
            del wire


class Links:
    """The four ends of a stage; None where the pipeline ends.

    Args:
        forward: the communicator of the activations.
        backward: that of the gradients; another one, or one that keeps the directions apart.
        shape: [s, b, C] of what is exchanged (the streams are added by the communicator).
        microbatches: how many.
        in_flight: how many a stage starts ahead for each stage behind it. With one, a gradient's
            receive is posted behind the forward in front of it and no earlier: were both
            neighbours' hosts to wait for their devices, each would wait for the other's message.
        side_streams: the streams that wait and send.
    """

    def __init__(
        self,
        forward: Any,
        backward: Any,
        shape: Any,
        microbatches: int,
        in_flight: int,
        side_streams: SideStreams,
    ) -> None:
        def receive_input() -> tuple[Tensor, Any]:
            tensor, requests = forward.send_forward_recv_forward(None, True, shape, True)
            return tensor, requests["recv_prev"]

        def receive_gradient() -> tuple[Tensor, Any]:
            tensor, requests = backward.send_backward_recv_backward(None, True, shape, True)
            return tensor, requests["recv_next"]

        def send_output(tensor: Tensor) -> Any:
            return forward.send_forward_recv_forward(tensor, False, shape, True)[1]["send_next"]

        def send_gradient(tensor: Tensor) -> Any:
            return backward.send_backward_recv_backward(tensor, False, shape, True)[1]["send_prev"]

        first, last = forward.is_pp_first_stage, forward.is_pp_last_stage
        self.inputs = None if first else Inbox(receive_input, microbatches, side_streams)
        self.outputs = None if last else Outbox(send_output, side_streams)
        self.gradients = (
            None
            if last
            else Inbox(receive_gradient, microbatches, side_streams, ahead=in_flight > 1)
        )
        self.input_gradients = None if first else Outbox(send_gradient, side_streams)

    def drain(self) -> None:
        """Wait for what was sent last."""
        for outbox in (self.outputs, self.input_gradients):
            if outbox is not None:
                outbox.drain()


class SideStreamCommunicator(P2PCommunicator):
    """For Megatron's interleaved schedule: outputs leave from the stream that made them.

    That schedule lets the compute stream wait for each send before it frees what was sent. Here
    the memory of an output is kept until then, and the compute stream goes straight on. A gradient
    is sent as Megatron does it, from the compute stream: but it was made beside that one.

    Args:
        group, config: as for P2PCommunicator.
        side_streams: the streams of this rank's chunks, which all share their turns.
    """

    def __init__(self, group: Any, config: Any, side_streams: SideStreams) -> None:
        super().__init__(group, without_timers(config))
        self.side_streams = side_streams
        self._outbox = Outbox(self._send, side_streams)
        self._shape: Any = None

    def _send(self, wire: Tensor) -> Any:
        return super().send_forward_recv_forward(wire, False, self._shape, True)[1]["send_next"]

    def send_forward_recv_forward(
        self, output_tensor: Any, recv_prev: bool, tensor_shape: Any, overlap_p2p_comm: bool = False
    ) -> Any:
        """Send and receive apart; the send has no request that anybody needs to wait for.

        Without `overlap_p2p_comm` (warm-up, evaluation) Megatron waits for both, and sends from the
        compute stream, which has to wait for the output first.
        """
        if output_tensor is not None:
            if overlap_p2p_comm:
                self._shape = tensor_shape
                self._outbox.put(output_tensor, self.side_streams.microbatch)
            else:
                compute = torch.cuda.current_stream()
                compute.wait_stream(self.side_streams.of(self.side_streams.microbatch))
                record_use(output_tensor, compute)
            self.side_streams.microbatch += 1
        if overlap_p2p_comm:
            output_tensor = None
        return super().send_forward_recv_forward(
            output_tensor, recv_prev, tensor_shape, overlap_p2p_comm
        )

    def send_backward_recv_backward(
        self,
        input_tensor_grad: Any,
        recv_next: bool,
        tensor_shape: Any,
        overlap_p2p_comm: bool = False,
    ) -> Any:
        """The gradient's memory belongs to the stream that made it, and the send is waited for by
        the compute stream: without this it could be written again while it is sent.
        """
        if input_tensor_grad is not None:
            record_use(input_tensor_grad, torch.cuda.current_stream())
        return super().send_backward_recv_backward(
            input_tensor_grad, recv_next, tensor_shape, overlap_p2p_comm
        )

    def drain(self) -> None:
        """Wait for what was sent last."""
        self._outbox.drain()
