"""What a pipeline stage exchanges with its neighbours, posted early and waited for by streams.

    stage before  --- x -->   this stage   --- y -->   stage behind
                 <-- dx ---               <--- g ---

The directions have a process group each: over NCCL what a group exchanges with a neighbour is one
queue, and a receive that is posted early would hold up the sends behind it.
"""

import copy
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_mhc.model.config_marks import streams_of

from .deadline import Deadline
from .side_streams import SideStreams, record_use

_backward_groups: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def two_directions(group: Any, config: Any) -> tuple[P2PCommunicator, P2PCommunicator]:
    """Communicators of a pipeline's ranks for its activations, and for its gradients.

    The first call for a group is a collective over all ranks of the job, those of other pipelines
    included: it makes a second group for every pipeline, and connects neighbours.

    Args:
        group: the pipeline's process group.
        config: the model's configuration.
    """
    if group not in _backward_groups:
        with Deadline(f"rank {dist.get_rank()}") as deadline:
            _backward_groups[group] = _second_group(group, deadline)
            _connect(*_communicators(group, config), deadline)
    return _communicators(group, config)


def _second_group(group: Any, deadline: Deadline) -> Any:
    """A process group of the same ranks.

    PyTorch names a group by how many were made before it, so every rank makes every pipeline's, in
    one order. A group that its own ranks make alone (`use_local_synchronization`) gets another name
    on each of them where they are in different numbers of groups, as stages are: it never connects.
    """
    mine = dist.get_process_group_ranks(group)
    deadline.waits_for(
        "every rank of the job to begin its first step with --mhc-overlap-p2p, for the pipelines'"
        " second process groups"
    )
    pipelines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pipelines, mine)
    made = {
        ranks: dist.new_group(ranks, backend=dist.get_backend(group))
        for ranks in sorted({tuple(ranks) for ranks in pipelines})
    }
    return made[tuple(mine)]


def _communicators(group: Any, config: Any) -> tuple[P2PCommunicator, P2PCommunicator]:
    config = _without_timers(config)
    config.batch_p2p_comm = False  # a batch of messages is waited for as one
    return P2PCommunicator(group, config), P2PCommunicator(_backward_groups[group], config)


def _without_timers(config: Any) -> Any:
    """A copy whose messages nobody times: a timer lets the host wait for the whole device."""
    config = copy.copy(config)
    config.timers = None
    return config


def _connect(forward: P2PCommunicator, backward: P2PCommunicator, deadline: Deadline) -> None:
    """Let a first small message go over each link, one after the other.

    NCCL connects two ranks at their first message, and their hosts wait for each other. In the
    middle of a step one of them can stand behind a receive that was posted early, for good.
    """
    config = forward.config
    shape = (1, 1, config.hidden_size)
    width = streams_of(config) * config.hidden_size
    message = torch.zeros(1, 1, width, dtype=config.pipeline_dtype, device="cuda")
    first, last = forward.is_pp_first_stage, forward.is_pp_last_stage
    stage, rank = forward.current_stage, dist.get_rank()

    def link(what: str, neighbour: int, its_rank: Any) -> None:
        deadline.waits_for(
            f"the link between pipeline stages {stage} (rank {rank}) and {neighbour}"
            f" (rank {its_rank}) to connect, for {what}"
        )

    if not first:
        link("activations", stage - 1, forward.prev_rank)
        forward.send_forward_recv_forward(None, True, shape)
    if not last:
        link("activations", stage + 1, forward.next_rank)
        forward.send_forward_recv_forward(message, False, shape)
        link("gradients", stage + 1, forward.next_rank)
        backward.send_backward_recv_backward(None, True, shape)
    if not first:
        link("gradients", stage - 1, forward.prev_rank)
        backward.send_backward_recv_backward(message, False, shape)
    torch.cuda.synchronize()


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
        super().__init__(group, _without_timers(config))
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
