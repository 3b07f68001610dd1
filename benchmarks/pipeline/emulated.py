"""One stage on one GPU between neighbours that are made up: what of their messages is exposed.

Exposed is what a step takes longer than over links that take no time, a median over rounds.
"""

import argparse
import gc
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.common.timing import elapsed_ms
from benchmarks.pipeline.neighbours import Neighbours, Pace, cycles_per_ms
from benchmarks.pipeline.stage import ORDERS, Sizes, Stage
from megatron_mhc import MHCConfig
from megatron_mhc.model.config_marks import IN_FLIGHT


class EmulatedStage(Stage):
    """A stage between `Neighbours`."""

    def __init__(self, sizes: Sizes, mhc: MHCConfig, microbatches: int) -> None:
        super().__init__(sizes, mhc, microbatches)
        shape = (sizes.sequence, sizes.batch, sizes.hidden * mhc.num_streams)
        self.wire_bytes = 2 * torch.Size(shape).numel()
        self.neighbours = Neighbours(self.config, self.groups.pp, shape, Pace(), cycles_per_ms())

    def choose(self, order: str, pace: Pace) -> None:
        """The order of the steps that follow, and the pace of links and neighbours."""
        self.neighbours.set_pace(pace)
        self.choose_order(order)

    def step(self, forward_only: bool = False) -> None:
        """One step; gradients stay in the parameters."""
        self.clear()
        self.neighbours.begin(self.microbatches, max(1, getattr(self.config, IN_FLIGHT)))

        def forward_step(_: Any, model: torch.nn.Module) -> tuple[Any, Any]:
            return model(None, self.positions, self.sizes.mask()), None

        self.schedule(
            forward_step,
            forward_only=forward_only,
            p2p_communicator=self.neighbours,
            pg_collection=self.groups,
        )

    def time(
        self, order: str, pace: Pace, steps: int, forward_only: bool = False
    ) -> tuple[float, float]:
        """The median of some steps in milliseconds, after two that warm up; peak memory in GiB."""
        self.choose(order, pace)
        times = []
        gc.disable()  # a collection in mid-step takes as long as what is looked for
        for index in range(steps + 2):
            gc.collect()  # what a step left in cycles would be held during the next one
            if index == 2:
                torch.cuda.reset_peak_memory_stats()
            times.append(elapsed_ms(lambda: self.step(forward_only)))
        gc.enable()
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
        return statistics.median(times[2:]), peak


@dataclass
class Case:
    """An order of the steps among one kind of neighbours: what each round measured.

    Attributes:
        steps, free: medians of a round's steps, ms; over links that take no time.
        peak: GiB.
    """

    steps: list[float] = field(default_factory=list)
    free: list[float] = field(default_factory=list)
    peak: float = 0.0

    def exposed(self, beside: "Case") -> list[float]:
        """ms of each round beyond a step of `beside` over links that take no time."""
        return [step - free for step, free in zip(self.steps, beside.free, strict=True)]


def report(kind: str, cases: dict[str, Case]) -> dict[str, Any]:
    """Print and return the rows of one kind of neighbours; the first case is stock order."""
    stock = next(iter(cases.values()))
    of_stock = statistics.median(stock.exposed(stock))
    rows = {}
    for order, case in cases.items():
        own, stocks = case.exposed(case), case.exposed(stock)
        step = statistics.median(case.steps)
        row = {
            "step_ms": step,
            "step_ms_by_round": case.steps,
            "free_ms": statistics.median(case.free),
            "free_ms_by_round": case.free,
            "exposed_ms": statistics.median(own),
            "beyond_stock_free_ms": statistics.median(stocks),
            "peak_gib": case.peak,
        }
        rows[f"{kind}, {order}"] = row
        print(
            f"{kind:11}{order:22}{step:9.1f}{max(case.steps) - min(case.steps):8.1f}"
            f"{row['free_ms']:11.1f}{row['exposed_ms']:11.2f}{min(own):8.1f}{max(own):8.1f}"
            f"{row['exposed_ms'] / step:9.1%}{row['exposed_ms'] / of_stock:9.1%}"
            f"{row['beyond_stock_free_ms'] / of_stock:10.1%}{case.peak:9.1f}",
            flush=True,
        )
    return rows


def measure(stage: EmulatedStage, options: argparse.Namespace) -> dict[str, Any]:
    """The table: each order and kind of neighbour, over links that take time and that do not.

    In rounds, so that a machine that drifts does so under all cases alike.
    """
    forward = stage.time("stock order", Pace(), options.steps, forward_only=True)[0]
    whole = stage.time("stock order", Pace(), options.steps)[0]
    forward, whole = forward / stage.microbatches, whole / stage.microbatches
    message = stage.wire_bytes / options.gigabytes / 1e6 + options.latency_us / 1e3
    print(
        f"a microbatch: forward {forward:.2f} ms, backward {whole - forward:.2f} ms;"
        f" a message: {stage.wire_bytes / 1e6:.0f} MB, {message:.2f} ms at"
        f" {options.gigabytes} GB/s and {options.latency_us} us"
    )
    link = {"gigabytes": options.gigabytes, "latency_us": options.latency_us}
    # a little faster, so that what is measured is this stage
    busy = {"forward_ms": 0.98 * forward, "backward_ms": 0.98 * (whole - forward)}
    neighbours: dict[str, dict[str, float]] = {"ready": {}, "computing": busy}
    cases = {kind: {order: Case() for order in ORDERS} for kind in options.neighbours}
    rows: dict[str, Any] = {}
    for number in range(options.rounds):
        for kind in cases:
            compute = neighbours[kind]
            for order, case in cases[kind].items():
                case.free.append(stage.time(order, Pace(**compute), options.steps)[0])
                step, peak = stage.time(order, Pace(**link, **compute), options.steps)
                case.steps.append(step)
                case.peak = max(case.peak, peak)
        print(
            f"after round {number + 1} of {options.rounds}; of stock: of what stock order exposes,"
            " by the order's own step over free links and by stock order's\n"
            f"{'neighbours':11}{'order':22}{'step ms':>9}{'spread':>8}{'free links':>11}"
            f"{'exposed ms':>11}{'least':>8}{'most':>8}{'of step':>9}{'of stock':>9}"
            f"{'by stock':>10}{'peak GiB':>9}"
        )
        for kind, found in cases.items():
            rows |= report(kind, found)
    rows["microbatch"] = {"forward_ms": forward, "backward_ms": whole - forward, "message": message}
    rows["busy"] = busy
    return rows
