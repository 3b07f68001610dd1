"""Two process groups for a pipeline, connected before its first step posts anything.

The directions have a process group each: over NCCL what a group exchanges with a neighbour is one
queue, and a receive that is posted early would hold up the sends behind it.
"""

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_mhc.model.config_marks import message_width

from .deadline import Deadline

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
    config = without_timers(config)
    config.batch_p2p_comm = False  # a batch of messages is waited for as one
    return P2PCommunicator(group, config), P2PCommunicator(_backward_groups[group], config)


def without_timers(config: Any) -> Any:
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
    width = message_width(config) or config.hidden_size
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
