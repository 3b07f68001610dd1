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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_mhc.model.arrange import arrange
from megatron_mhc.model.config_marks import overlap_in_flight_of
from megatron_mhc.model.layer import MHCLayer
from megatron_mhc.model.recompute import rebuild_ahead
from megatron_mhc.model.site import INLINE, Inline

from .agreement import check_stages
from .links import Links, SideStreamCommunicator, two_directions
from .side_streams import SideStreams

NCCL = "nccl"


def set_ends(chunk: torch.nn.Module, side_streams: Inline) -> None:
    """Where the first and the last site of a model chunk work on the streams.

    The first site of the model reads the embedding and the last one feeds the head: both of them
    have no link, and stay on the compute stream.
    """
    for module in chunk.modules():
        if isinstance(module, TransformerBlock):
            arrange(module)  # before it is asked which layers are the ends
    layers = [m for m in chunk.modules() if isinstance(m, MHCLayer) and not m.is_mtp]
    if not layers[0].is_entry:
        layers[0].attention_site.side_streams = side_streams
    if not layers[-1].is_exit:
        layers[-1].mlp_site.side_streams = side_streams


def side_streams_of(chunks: list[torch.nn.Module], in_flight: int) -> Any:
    """The streams of these model chunks, the same ones in every step.

    Each stream has a part of the allocator's memory to itself, which new ones would not find.
    """
    kept = vars(chunks[0])
    if "mhc_side_streams" not in kept:
        kept["mhc_side_streams"] = SideStreams(in_flight, chunks)
    return kept["mhc_side_streams"]


@contextlib.contextmanager
def ends_on_side_streams(
    chunks: list[torch.nn.Module], side_streams: SideStreams
) -> Iterator[None]:
    """For one step, the ends of these model chunks work beside the compute stream."""
    for chunk in chunks:
        set_ends(chunk, side_streams)
    side_streams.begin()
    try:
        yield
    finally:
        side_streams.end()
        for chunk in chunks:
            set_ends(chunk, INLINE)


def one_forward_one_backward(
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
) -> list[Any]:
    """A step of this stage, in the place of `forward_backward_pipelining_without_interleaving`.

    Args:
        rebuild_ahead: called with the model before a gradient is waited for; rebuilds, on the
            current stream, what the oldest microbatch's backward reads first, and returns whether
            it did.
        p2p_communicator: one of the caller's own serves both directions, and must keep them apart.
        (the rest): as for Megatron's function.

    Returns:
        What the loss function returned for each microbatch on the last stage, else nothing.

    Raises:
        ValueError: an argument that this schedule has no place for.
    """
    if adjust_tensor_shapes_fn is not None:
        raise ValueError(
            "--mhc-overlap-p2p does not work with adjust_tensor_shapes_fn (knowledge distillation):"
            " drop one of them"
        )
    (model,) = model if isinstance(model, list) else [model]
    (data_iterator,) = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    config = get_model_config(model)
    if pg_collection is None:
        pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    directions = (p2p_communicator, p2p_communicator)
    if p2p_communicator is None:
        directions = two_directions(pg_collection.pp, config)
    here = directions[0]
    last = here.is_pp_last_stage
    (shape,) = schedules.get_tensor_shapes(
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=decoder_seq_length,
        config=config,
        tp_group=pg_collection.tp,
        cp_group=pg_collection.cp,
    )
    behind = here.total_stages - here.current_stage - 1
    warmup = min(behind * overlap_in_flight_of(config), num_microbatches)
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
    finalize = config.finalize_model_grads_func is not None and not forward_only
    if finalize:
        embedding = schedules.clear_embedding_activation_buffer(config, model, last)

    side_streams = side_streams_of([model], behind * overlap_in_flight_of(config))
    links = Links(*directions, shape, num_microbatches, overlap_in_flight_of(config), side_streams)
    gradients = links.gradients
    waiting: deque[tuple[Tensor | None, Tensor]] = deque()
    results: list[Any] = []
    tokens = torch.zeros([], dtype=torch.int, device="cuda")

    def forward(microbatch: int) -> None:
        nonlocal tokens
        side_streams.microbatch = microbatch
        x = None if links.inputs is None else links.inputs.take(microbatch)
        side_streams.arrived = x
        y, new_tokens = schedules.forward_step(
            forward_step_func,
            data_iterator,
            model,
            num_microbatches,
            x,
            results,
            config,
            cp_group_size=pg_collection.cp.size(),
            collect_non_loss_data=collect_non_loss_data,
            is_first_microbatch=schedules.check_first_val_step(
                first_val_step, forward_only, microbatch == 0
            ),
            current_microbatch=microbatch,
            is_last_stage=last,
        )
        tokens += new_tokens
        if links.outputs is not None:
            links.outputs.put(y, microbatch)
        if not forward_only:
            waiting.append((x, y))
            schedules.deallocate_output_tensor(y, config.deallocate_pipeline_outputs)

    def backward(microbatch: int) -> None:
        x, y = waiting.popleft()
        stream = side_streams.of(microbatch)
        if gradients and not gradients.ahead:
            gradients.post()
        # the one place for it: what is stored here is rebuilt before the gradient is waited for
        rebuilt = rebuild_ahead(model)
        if rebuilt or gradients is None:
            stream.wait_stream(torch.cuda.current_stream())
        g = None if gradients is None else gradients.take(microbatch)
        # called from there, the first operation waits for the gradient alone, and the compute
        # stream for nothing but what it reads
        with torch.cuda.stream(stream):
            dx = schedules.backward_step(x, y, g, config)
        if links.input_gradients is not None:
            links.input_gradients.put(dx, microbatch)

    with contextlib.ExitStack() as no_sync, ends_on_side_streams([model], side_streams):
        no_sync.enter_context((config.no_sync_func or contextlib.nullcontext)())
        if links.inputs is not None:
            links.inputs.post()
        for microbatch in range(num_microbatches + (0 if forward_only else warmup)):
            if microbatch == warmup and not forward_only and gradients and gradients.ahead:
                gradients.post()
            if microbatch < num_microbatches:
                forward(microbatch)
            if microbatch >= warmup and not forward_only:
                if microbatch - warmup == num_microbatches - 1 and (
                    config.grad_sync_func is None or here.is_pp_first_stage
                ):
                    no_sync.close()
                backward(microbatch - warmup)
        links.drain()
    if not (forward_only or config.grad_sync_func is None or here.is_pp_first_stage):
        config.grad_sync_func(model.parameters())
    if finalize:
        schedules.finish_embedding_wgrad_compute(config, embedding, last, pg_collection.tp)
        config.finalize_model_grads_func(
            [model],
            tokens if config.calculate_per_token_loss else None,
            pg_collection=pg_collection,
            force_all_reduce=force_all_reduce,
        )
    if config.timers is not None:
        config.timers("forward-backward").stop()
    return results


def interleaved(original: Callable[..., Any], **arguments: Any) -> Any:
    """Megatron's interleaved schedule, with the ends of each chunk beside the compute stream.

    It posts receives early by itself. What is added: outputs leave from the stream that made them,
    nobody waits for them, and the gradients of both ends run where their forwards ran.
    """
    chunks = arguments["model"]
    config = get_model_config(chunks[0])
    if arguments.pop("p2p_communicator", None) is not None:
        raise ValueError("--mhc-overlap-p2p makes the interleaved schedule's communicator itself")
    if arguments.get("pg_collection") is None:
        arguments["pg_collection"] = ProcessGroupCollection.use_mpu_process_groups()
    side_streams = side_streams_of(chunks, 1)
    communicator = SideStreamCommunicator(arguments["pg_collection"].pp, config, side_streams)
    with ends_on_side_streams(chunks, side_streams):
        result = original(**arguments, p2p_communicator=communicator)
        communicator.drain()
    return result


def _pipeline_group(arguments: dict[str, Any]) -> Any:
    """The process group of a schedule's pipeline; None for one of several modules, which has none.

    Its stages tell each other their shapes (Megatron wants `variable_seq_lengths` there).
    """
    communicator, groups = arguments.get("p2p_communicator"), arguments.get("pg_collection")
    if communicator is None and groups is None:
        return parallel_state.get_pipeline_model_parallel_group()
    return getattr(communicator, "pp_group", None) or getattr(groups, "pp", None)


def _first_over_nccl(chunk: Any, group: Any, forward_only: bool) -> bool:
    """Whether this is a model's first training step, or its first evaluation, over NCCL.

    It runs in stock order. CUDA loads a kernel at its first launch and may wait for all that runs
    by then: for a receive that was posted early, whose sender waits for us. The bits are the same.
    """
    if torch.distributed.get_backend(group) != NCCL:
        return False
    seen = vars(chunk).setdefault("mhc_steps_seen", set())
    first = forward_only not in seen
    seen.add(forward_only)
    return first


def run_overlapped(name: str, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Run one of Megatron's schedules, or for a model that overlaps its communication, ours.

    Whichever way a model got its mHC, its pipeline passes here: before its first step, stages are
    checked (`check_stages`, which says what it raises).

    Args:
        name: Megatron's name of the schedule.
        original: Megatron's schedule.
        arguments: what it was called with, all by keyword.
    """
    model = arguments["model"]
    chunks = model if isinstance(model, list) else [model]
    config = get_model_config(chunks[0])
    group = _pipeline_group(arguments)
    check_stages(chunks, config, group, arguments)
    if overlap_in_flight_of(config) == 0:
        return original(**arguments)
    # a caller's own communicator has its own idea of what stands ready
    own = arguments.get("p2p_communicator") is not None
    is_interleaved = name.endswith("_with_interleaving")
    if not (own or is_interleaved):
        two_directions(group, config)  # connected before the first step posts anything
    if not own and _first_over_nccl(chunks[0], group, arguments.get("forward_only", False)):
        return original(**arguments)
    if is_interleaved:
        return interleaved(original, **arguments)
    return one_forward_one_backward(**arguments)
