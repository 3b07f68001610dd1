"""1F1B with the ends of a stage, and its links, on high-priority streams (`--mhc-overlap-p2p`).

A stage in its steady state, time from left to right: F is a forward, B a backward, R what is
rebuilt ahead of a backward; pre, cmb and their gradients pre', cmb' are the stage's first and last
operation on the streams (paper section 4.3.3: F_post,res on a high-priority stream).

    links in     x4 ....>       g2 ....>           x5 ....>    g3 ....>
    priority            [pre 4][pre' 1][cmb' 2][cmb 4]         [pre 5][pre' 2][cmb' 3]
    compute     [ R 1 ][  B 1 ][     F 4     ][ R 2 ][   B 2   ][     F 5     ][ R 3 ][ B 3
    links out                        dx1 ....>       y4 ....>          dx2 ....>

* Receives are posted a microbatch ahead (with one in flight, a gradient's behind the forward in
  front of it); only the operation that reads them waits for them.
* Sends leave from the stream that made their tensor, as soon as it is there; the compute stream
  never waits for one. Their memory is kept until they are through (`links.Outbox`).
* A microbatch's work beside the compute stream is on one stream, those that meet on different ones
  (`side_streams.SideStreams`). Events alone keep the order; the host waits for nothing.
* A stage starts by as many forwards as there are stages behind it, times `overlap_in_flight`. With
  1 this is 1F1B: in its steady state a stage still waits for its gradient to make the round trip,
  two messages, through the stage behind. With 2 that wait is gone, for twice the activations.

The order of forwards and of backwards is 1F1B's, and so is every sum: bit for bit. Over NCCL the
first step is in stock order, with no receive posted early while kernels are still being loaded.
"""

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_mhc.model.config_marks import overlap_in_flight_of

from .connect import two_directions
from .links import Links
from .stage_ends import ends_on_side_streams
from .state import rebuild_ahead, state_of


class Overlapped1F1B:
    """A step of this stage, in the place of `forward_backward_pipelining_without_interleaving`.

    Args:
        rebuild_ahead: called with the model before a gradient is waited for; rebuilds, on the
            current stream, what the oldest microbatch's backward reads first, and returns whether
            it did.
        p2p_communicator: one of the caller's own serves both directions, and must keep them apart.
        (the rest): as for Megatron's function.

    Raises:
        ValueError: an argument that this schedule has no place for.
    """

    def __init__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        model: Any,
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        adjust_tensor_shapes_fn: Callable[..., Any] | None = None,
        p2p_communicator: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
        force_all_reduce: bool | None = False,
        rebuild_ahead: Callable[[torch.nn.Module], bool] = rebuild_ahead,
    ) -> None:
        if adjust_tensor_shapes_fn is not None:
            raise ValueError(
                "--mhc-overlap-p2p does not work with adjust_tensor_shapes_fn (knowledge"
                " distillation): drop one of them"
            )
        (self.model,) = model if isinstance(model, list) else [model]
        (data,) = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        self.config = get_model_config(self.model)
        self.groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.forward_step = (forward_step_func, data)
        self.microbatches = num_microbatches
        self.forward_only = forward_only
        self.collect_non_loss_data = collect_non_loss_data
        self.first_val_step = first_val_step
        self.force_all_reduce = force_all_reduce
        self.rebuild_ahead = rebuild_ahead
        directions = (p2p_communicator, p2p_communicator)
        if p2p_communicator is None:
            directions = two_directions(self.groups.pp, self.config)
        self.is_first = directions[0].is_pp_first_stage
        self.is_last = directions[0].is_pp_last_stage
        (shape,) = schedules.get_tensor_shapes(
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            decoder_seq_length=decoder_seq_length,
            config=self.config,
            tp_group=self.groups.tp,
            cp_group=self.groups.cp,
        )
        in_flight = overlap_in_flight_of(self.config)
        ahead = (directions[0].total_stages - directions[0].current_stage - 1) * in_flight
        self.warmup = min(ahead, num_microbatches)
        self.side_streams = state_of(self.model).side_streams_of([self.model], ahead)
        self.links = Links(*directions, shape, num_microbatches, in_flight, self.side_streams)
        self.waiting: deque[tuple[Tensor | None, Tensor]] = deque()
        self.results: list[Any] = []
        self.tokens = torch.zeros([], dtype=torch.int, device="cuda")

    def run(self) -> list[Any]:
        """What the loss function returned for each microbatch on the last stage, else nothing."""
        config, timers = self.config, self.config.timers
        if timers is not None:
            barrier = config.barrier_with_L1_time
            timers("forward-backward", log_level=1).start(barrier=barrier)
        finalizes = config.finalize_model_grads_func is not None and not self.forward_only
        embedding = None
        if finalizes:
            embedding = schedules.clear_embedding_activation_buffer(
                config, self.model, self.is_last
            )
        self._all_microbatches()
        if not (self.forward_only or config.grad_sync_func is None or self.is_first):
            config.grad_sync_func(self.model.parameters())
        if finalizes:
            self._finalize(embedding)
        if timers is not None:
            timers("forward-backward").stop()
        return self.results

    def _all_microbatches(self) -> None:
        """The forwards, and behind the warm-up a backward after each."""
        last = self.microbatches - 1
        syncs_last = self.config.grad_sync_func is None or self.is_first
        with (
            contextlib.ExitStack() as no_sync,
            ends_on_side_streams([self.model], self.side_streams),
        ):
            no_sync.enter_context((self.config.no_sync_func or contextlib.nullcontext)())
            if self.links.inputs is not None:
                self.links.inputs.post()
            for turn in range(self.microbatches + (0 if self.forward_only else self.warmup)):
                if turn == self.warmup:
                    self._post_first_gradient()
                if turn < self.microbatches:
                    self.forward(turn)
                if turn >= self.warmup and not self.forward_only:
                    if turn - self.warmup == last and syncs_last:
                        no_sync.close()
                    self.backward(turn - self.warmup)
            self.links.drain()

    def _post_first_gradient(self) -> None:
        gradients = self.links.gradients
        if gradients is not None and gradients.ahead and not self.forward_only:
            gradients.post()

    def forward(self, microbatch: int) -> None:
        """A microbatch's forward, from its streams' arrival to their sending."""
        side_streams, links = self.side_streams, self.links
        side_streams.microbatch = microbatch
        x = None if links.inputs is None else links.inputs.take(microbatch)
        side_streams.arrived = x
        forward_step_func, data_iterator = self.forward_step
        y, tokens = schedules.forward_step(
            forward_step_func,
            data_iterator,
            self.model,
            self.microbatches,
            x,
            self.results,
            self.config,
            cp_group_size=self.groups.cp.size(),
            collect_non_loss_data=self.collect_non_loss_data,
            is_first_microbatch=schedules.check_first_val_step(
                self.first_val_step, self.forward_only, microbatch == 0
            ),
            current_microbatch=microbatch,
            is_last_stage=self.is_last,
        )
        self.tokens += tokens
        if links.outputs is not None:
            links.outputs.put(y, microbatch)
        if not self.forward_only:
            self.waiting.append((x, y))
            schedules.deallocate_output_tensor(y, self.config.deallocate_pipeline_outputs)

    def backward(self, microbatch: int) -> None:
        """The oldest microbatch's backward, from its gradient's arrival to its own sending."""
        x, y = self.waiting.popleft()
        stream, gradients = self.side_streams.of(microbatch), self.links.gradients
        if gradients is not None and not gradients.ahead:
            gradients.post()
        # the one place for it: what is stored here is rebuilt before the gradient is waited for
        is_rebuilt = self.rebuild_ahead(self.model)
        if is_rebuilt or gradients is None:
            stream.wait_stream(torch.cuda.current_stream())
        g = None if gradients is None else gradients.take(microbatch)
        # called from there, the first operation waits for the gradient alone, and the compute
        # stream for nothing but what it reads
        with torch.cuda.stream(stream):
            dx = schedules.backward_step(x, y, g, self.config)
        if self.links.input_gradients is not None:
            self.links.input_gradients.put(dx, microbatch)

    def _finalize(self, embedding: Any) -> None:
        """Megatron's end of a step: the embedding's late gradient, and all ranks' sums."""
        schedules.finish_embedding_wgrad_compute(
            self.config, embedding, self.is_last, self.groups.tp
        )
        self.config.finalize_model_grads_func(
            [self.model],
            self.tokens if self.config.calculate_per_token_loss else None,
            pg_collection=self.groups,
            force_all_reduce=self.force_all_reduce,
        )
