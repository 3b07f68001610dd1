"""Which schedule a pipeline's step runs: Megatron's, or one whose messages overlap."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from megatron_mhc.model.config_marks import overlap_in_flight_of

from .agreement import check_stages
from .connect import two_directions
from .links import SideStreamCommunicator
from .overlapped_1f1b import Overlapped1F1B
from .stage_ends import ends_on_side_streams
from .state import state_of

NCCL = "nccl"


def interleaved(original: Callable[..., Any], **arguments: Any) -> Any:
    """Megatron's interleaved schedule, with the ends of each chunk beside the compute stream.

    It posts receives early by itself. What is added: outputs leave from the stream that made them,
    nobody waits for them, and the gradients of both ends run where their forwards ran.
    """
    chunks = arguments["model"]
    config = get_model_config(chunks[0])
    if arguments.pop("p2p_communicator", None) is not None:
        raise ValueError(
            "the script hands the schedule a p2p_communicator, and --mhc-overlap-p2p makes the"
            " interleaved schedule's communicator itself: hand none, or drop the flag"
        )
    if arguments.get("pg_collection") is None:
        arguments["pg_collection"] = ProcessGroupCollection.use_mpu_process_groups()
    side_streams = state_of(chunks[0]).side_streams_of(chunks, 1)
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
    begun = state_of(chunk).kinds_begun
    is_first = forward_only not in begun
    begun.add(forward_only)
    return is_first


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
    return Overlapped1F1B(**arguments).run()
