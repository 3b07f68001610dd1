"""Neighbours of a pipeline stage that are made up, and the links to them, on the stage's GPU.

`Neighbours` stands in the place of Megatron's P2PCommunicator. A link is a copy to or from pinned
host memory on a stream of its own, slowed down to a bandwidth and a latency. A neighbour either has
its messages ready, or is a stage of the same speed in the same schedule: what it sends then leaves
when it could have computed it from what it was sent.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from benchmarks.common.timing import elapsed_ms
from benchmarks.pipeline.stage import StageGroup
from megatron_mhc.patches import cpu


@dataclass
class Pace:
    """How links and neighbours behave.

    Attributes:
        gigabytes: a link's bandwidth in 10^9 bytes a second; None copies on the device instead.
        latency_us: before a message's first byte.
        forward_ms, backward_ms: what a neighbour computes; None has all its messages ready.
        jitter_ms: at most so much more before each message, at random.
    """

    gigabytes: float | None = None
    latency_us: float = 0.0
    forward_ms: float | None = None
    backward_ms: float | None = None
    jitter_ms: float = 0.0


def cycles_per_ms() -> float:
    """Clock cycles that `torch.cuda._sleep` counts in a millisecond; 0 where there is none."""
    if cpu.active():
        return 0.0
    torch.cuda._sleep(1_000_000)
    return 1e7 / max(elapsed_ms(lambda: torch.cuda._sleep(10_000_000)), 1e-3)


class Wire:
    """One direction of one link: a stream of its own and pinned memory at its other end."""

    def __init__(self, shape: tuple[int, ...], seed: int, cycles: float) -> None:
        self.stream = torch.cuda.Stream()
        generator = torch.Generator().manual_seed(seed)
        far = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        self.far = far.bfloat16().pin_memory()
        self.near = self.far.cuda()
        self.pace, self.cycles = Pace(), cycles
        self.random = torch.Generator()
        self._copy()
        self.copy_ms = elapsed_ms(self._copy)

    def _copy(self) -> None:
        self.near.copy_(self.far, non_blocking=True)

    def send(self, tensor: Tensor) -> Any:
        """Start a message to the other end, behind the current stream; the event of its end."""
        return self._move(None if self.pace.gigabytes is None else self.far, tensor, None)

    def receive(self, tensor: Tensor, ready: Any) -> Any:
        """Start a message from there, when it is ready; the event of its end."""
        return self._move(tensor, self.near if self.pace.gigabytes is None else self.far, ready)

    def _move(self, target: Tensor | None, source: Tensor, ready: Any) -> Any:
        stream, pace = self.stream, self.pace
        stream.wait_stream(torch.cuda.current_stream())
        if ready is not None:
            stream.wait_event(ready)
        # stock order sends what autograd made: the far end would remember every microbatch's graph
        with torch.no_grad(), torch.cuda.stream(stream):
            slower = pace.jitter_ms * torch.rand((), generator=self.random).item()
            if pace.gigabytes is not None:
                size = source.numel() * source.element_size()
                slower += size / pace.gigabytes / 1e6 - self.copy_ms + pace.latency_us / 1e3
            if slower > 0 and self.cycles:
                torch.cuda._sleep(int(slower * self.cycles))
            if target is not None:
                target.copy_(source, non_blocking=True)
        for tensor in (target, source):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(stream)
        return stream.record_event()


@dataclass
class Request:
    """What `wait` of a message waits for."""

    event: Any

    def wait(self) -> None:
        """Let the current stream wait for the message."""
        torch.cuda.current_stream().wait_event(self.event)


@dataclass
class Neighbour:
    """A stage of the same speed: what it computes, as sleeps on a stream of its own."""

    cycles: float
    stream: Any = field(default_factory=torch.cuda.Stream)
    ready: list[Any] = field(default_factory=list)

    def compute(self, after: Any, *milliseconds: float) -> Any:
        """Work that starts after an event; returns the event of its end."""
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            for duration in milliseconds:
                if self.cycles:
                    torch.cuda._sleep(int(duration * self.cycles))
        return self.stream.record_event()


class Neighbours(P2PCommunicator):
    """The stage before and the stage behind, and the links to them.

    Args:
        config: the model's.
        group: where the stage stands.
        shape: [s, b, n*C] of what is exchanged.
        pace: of links and neighbours.
        cycles: `cycles_per_ms()`.
    """

    def __init__(
        self, config: Any, group: StageGroup, shape: tuple[int, ...], pace: Pace, cycles: float
    ) -> None:
        # not P2PCommunicator's, which asks a process group for ranks
        self.pp_group: Any = group
        self.config = config
        self.virtual_pipeline_model_parallel_size = None
        self.shape = shape
        self.wires = [Wire(shape, seed, cycles) for seed in range(4)]
        self.to_next, self.from_next, self.to_prev, self.from_prev = self.wires
        self.before, self.behind = Neighbour(cycles), Neighbour(cycles)
        self.in_flight = 1
        self.microbatches = 0
        self.set_pace(pace)

    def set_pace(self, pace: Pace) -> None:
        """Another pace, and jitter from its start, for the steps that follow."""
        self.pace = pace
        for seed, wire in enumerate(self.wires):
            wire.pace, wire.random = pace, torch.Generator().manual_seed(seed)

    def begin(self, microbatches: int, in_flight: int) -> None:
        """Before a step: how many microbatches, and how far stages start ahead."""
        self.microbatches, self.in_flight = microbatches, in_flight
        for neighbour in (self.before, self.behind):
            neighbour.ready = []
            neighbour.stream.wait_stream(torch.cuda.current_stream())
        self.sent_forward = self.sent_backward = 0
        self.received_forward = self.received_backward = 0
        stages_behind = self.total_stages - self.current_stage - 1
        self.behind_ahead = min((stages_behind - 1) * in_flight, microbatches)
        self.before_ahead = min((stages_behind + 1) * in_flight, microbatches)
        if self.pace.forward_ms is not None:
            first = min(self.before_ahead + 1, microbatches)
            self.before.ready = [
                self.before.compute(None, self.pace.forward_ms) for _ in range(first)
            ]

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        """As P2PCommunicator's, over these links."""
        requests: dict[str, Request] = {}
        if tensor_send_next is not None:
            event = self.to_next.send(tensor_send_next)
            requests["send_next"] = Request(event)
            self._behind_got(event)
        if tensor_send_prev is not None:
            event = self.to_prev.send(tensor_send_prev)
            requests["send_prev"] = Request(event)
            self._before_got(event)
        x = g = None
        if recv_prev:
            ready = self._ready(self.before, self.received_forward)
            x, requests["recv_prev"] = self._receive(self.from_prev, ready)
            self.received_forward += 1
        if recv_next:
            ready = self._ready(self.behind, self.received_backward)
            g, requests["recv_next"] = self._receive(self.from_next, ready)
            self.received_backward += 1
        if wait_on_reqs:
            for request in requests.values():
                request.wait()
        return x, g, requests

    def _receive(self, wire: Wire, ready: Any) -> tuple[Tensor, Request]:
        near = torch.empty(
            self.shape, dtype=torch.bfloat16, device=torch.cuda.current_device(), requires_grad=True
        )
        return near, Request(wire.receive(near.detach(), ready))

    def _ready(self, neighbour: Neighbour, message: int) -> Any:
        if self.pace.forward_ms is None:
            return None
        if message >= len(neighbour.ready):
            raise RuntimeError(
                f"message {message} was asked for before what it is computed from was sent"
            )
        return neighbour.ready[message]

    def _behind_got(self, event: Any) -> None:
        """A forward, and once enough are ahead a backward after each; the last ones in a row."""
        i, self.sent_forward = self.sent_forward, self.sent_forward + 1
        if self.pace.forward_ms is None or self.pace.backward_ms is None:
            return
        done = self.behind.compute(event, self.pace.forward_ms)
        backwards = int(i >= self.behind_ahead)
        if i == self.microbatches - 1:
            backwards += self.behind_ahead
        for _ in range(backwards):
            done = self.behind.compute(None, self.pace.backward_ms)
            self.behind.ready.append(done)

    def _before_got(self, event: Any) -> None:
        """A backward, and the next forward if there is one left."""
        self.sent_backward += 1
        if self.pace.forward_ms is None or self.pace.backward_ms is None:
            return
        done = self.before.compute(event, self.pace.backward_ms)
        if len(self.before.ready) < self.microbatches:
            done = self.before.compute(None, self.pace.forward_ms)
            self.before.ready.append(done)
