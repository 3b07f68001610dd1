"""A scenario's data, its forward step and what a step's losses are over all ranks."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor

from tests.megatron.common.scenario import SEQUENCE, VOCABULARY, Scenario


def batches(s: Scenario, step: int) -> Iterator[Tensor]:
    """This data-parallel rank's microbatches of tokens [b, length + 1]."""
    # two batches in turn: few enough to be learnt by heart
    generator = torch.Generator().manual_seed(1000 + step % 2)
    tokens = torch.randint(0, VOCABULARY, (s.batch, SEQUENCE + 1), generator=generator)
    ranks = parallel_state.get_data_parallel_world_size()
    lengths = s.lengths or [SEQUENCE] * s.microbatches
    for microbatch, length in zip(tokens.chunk(s.microbatches), lengths, strict=True):
        yield microbatch[:, : length + 1].chunk(ranks)[parallel_state.get_data_parallel_rank()]


def forward_step(
    iterator: Iterator[Tensor], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """Megatron's forward_step: the loss of a microbatch of tokens, averaged over them.

    With `return_schedule_plan`, as for expert-parallel overlap, the plan of what computes it.
    """
    tokens = next(iterator)
    length = tokens.shape[1] - 1
    positions = torch.arange(length).expand(tokens.shape[0], -1)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    run = model.build_schedule_plan if return_schedule_plan else model
    losses = run(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])

    def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean = output.float().mean()
        # a copy: the schedule divides the loss by the number of microbatches in place
        return mean, {"loss": mean.detach().clone()}

    return losses, loss


def mean_loss(reduced: list[dict[str, Tensor]]) -> float:
    """A step's loss, from the last stages of all data-parallel ranks."""
    mine = [entry["loss"].item() for entry in reduced]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    losses = torch.tensor([loss for rank in gathered for loss in rank])
    return losses.mean().item()


def mtp_loss() -> list[float]:
    """The losses of multi-token prediction since the last call, a depth each, as logged."""
    tracker = MTPLossLoggingHelper.tracker
    mine = tracker["loss_values"].tolist() if "loss_values" in tracker else None
    MTPLossLoggingHelper.tracker = {}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    ranks = [values for values in gathered if values is not None]
    return [sum(depth) / len(ranks) for depth in zip(*ranks, strict=True)]
