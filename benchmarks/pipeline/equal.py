"""Steps of a stage in each order over jittering links: the same bits in all of them?"""

import argparse
from typing import Any

import torch

from benchmarks.pipeline.emulated import EmulatedStage
from benchmarks.pipeline.neighbours import Pace
from benchmarks.pipeline.stage import ORDERS


def train_equal(stage: EmulatedStage, options: argparse.Namespace) -> None:
    """Train `--equal` steps in each order, from the same start, and compare with stock order.

    Raises:
        AssertionError: a parameter, or what was sent last, differs in a bit; or nothing can be
            said, because a value is not finite or most parameters did not move.
    """
    start = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    ended = {order: trained(stage, order, start, options) for order in ORDERS}
    stock = ended.pop("stock order")
    for name, value in stock.items():
        assert value.isfinite().all(), f"{name} is not finite: nothing to compare"
    # a norm's weight of 1 in bf16 moves by steps of 1/256 alone
    moved = sum(not torch.equal(stock[name], value.cpu()) for name, value in start.items())
    assert moved > len(start) // 2, f"only {moved} of {len(start)} parameters moved"
    for order, found in ended.items():
        other = [name for name, value in found.items() if not torch.equal(value, stock[name])]
        assert not other, f"{order} differs from stock order in {other}"
        print(
            f"{order}: {options.equal} steps, {len(found)} tensors as in stock order, bit for bit"
        )


def trained(
    stage: EmulatedStage, order: str, start: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Parameters after the steps, and the last messages that were sent."""
    stage.choose(order, Pace(options.gigabytes, options.latency_us, jitter_ms=1.0))
    with torch.no_grad():
        for name, parameter in stage.model.named_parameters():
            parameter.copy_(start[name])
    for _ in range(options.equal):
        stage.step()
        with torch.no_grad():
            for parameter in stage.model.parameters():
                # as far for a large gradient as for a small one: the loss has no bound
                size = parameter.grad.abs().mean().clamp_min(1e-30)
                parameter -= 1e-4 * parameter.grad / size
    torch.cuda.synchronize()
    return {n: p.detach().cpu().clone() for n, p in stage.model.named_parameters()} | {
        "sent forward": stage.neighbours.to_next.far.clone(),
        "sent backward": stage.neighbours.to_prev.far.clone(),
    }
