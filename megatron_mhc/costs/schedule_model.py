"""How long a pipeline's step takes, from what each stage does with a microbatch: a small model.

A stage goes through its forwards and backwards in Megatron's order, 1F1B or interleaved. Each waits
for its input from the neighbour; messages of one size take one time. In stock order a stage also
waits while it sends. Nothing else is modelled: no data parallelism, no optimizer, no jitter.
"""

from typing import NamedTuple

from .recompute_plan import microbatches_in_flight


class Work(NamedTuple):
    """What a stage does with one microbatch of one of its model chunks.

    Attributes:
        forward, backward: seconds.
    """

    forward: float
    backward: float


class Operation(NamedTuple):
    """A forward or backward of a microbatch in a model chunk."""

    is_forward: bool
    chunk: int
    microbatch: int


def order(
    stage: int, stages: int, microbatches: int, chunks: int = 1, group: int = 0, ahead: int = 1
) -> list[Operation]:
    """The operations of a stage, in the order of Megatron's schedule.

    Args:
        stage: this pipeline rank of `stages`.
        microbatches: of a step.
        chunks: model chunks a stage; above 1 the schedule is interleaved.
        group: microbatches in a row of one chunk (`microbatch_group_size_per_vp_stage`), by
            default as many as stages.
        ahead: `MHCConfig.overlap_in_flight`, of interest with one chunk.
    """
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    group = group or stages
    table = get_schedule_table(microbatches, chunks, microbatches if chunks == 1 else group)
    forwards = [Operation(True, chunk, microbatch) for microbatch, chunk in table]
    backwards = [Operation(False, chunks - 1 - chunk, microbatch) for microbatch, chunk in table]
    warm_up = microbatches_in_flight(stage, stages, chunks, group, ahead) - 1
    warm_up = 0 if stages == 1 else min(len(table), warm_up)
    found = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        found += [forward, backward]
    return found + backwards[len(table) - warm_up :]


def step_seconds(
    work: list[list[Work]],
    microbatches: int,
    message: float,
    *,
    overlapped: bool = False,
    group: int = 0,
    ahead: int = 1,
) -> float:
    """From the first forward to the last backward.

    Args:
        work: for each stage, of each of its model chunks.
        microbatches: of a step.
        message: seconds of a message between two stages.
        overlapped: whether a stage goes on while it sends.
        group, ahead: as in `order`.
    """
    stages, chunks = len(work), len(work[0])
    left = [
        order(stage, stages, microbatches, chunks, group, ahead)[::-1] for stage in range(stages)
    ]
    free = [0.0] * stages
    there: dict[tuple[Operation, int], float] = {}
    """When the input of an operation of a stage has come."""
    for microbatch in range(microbatches):
        there[Operation(True, 0, microbatch), 0] = 0.0
    while any(left):
        before = sum(map(len, left))
        for stage in range(stages):
            while left[stage] and (left[stage][-1], stage) in there:
                done = left[stage].pop()
                own = work[stage][done.chunk]
                took = own.forward if done.is_forward else own.backward
                end = max(free[stage], there[done, stage]) + took
                following = _following(done, stage, stages, chunks)
                sent = following is not None and following[1] != stage
                if following is not None:
                    there[following] = end + message * sent
                free[stage] = end + message * (sent and not overlapped)
        if sum(map(len, left)) == before:
            raise ValueError(
                f"{microbatches} microbatches in groups of {group or stages} end in a deadlock"
                " with virtual stages: choose --global-batch-size so that a step's microbatches"
                " are a multiple of the stages"
            )
    return max(free)


def _following(
    done: Operation, stage: int, stages: int, chunks: int
) -> tuple[Operation, int] | None:
    """What an operation's output is the input of, and on which stage; None at the very end."""
    step = 1 if done.is_forward else -1
    place = done.chunk * stages + stage + step
    if place < 0:
        return None
    if place == stages * chunks:  # the loss
        return done._replace(is_forward=False), stage
    return done._replace(chunk=place // stages), place % stages
