"""`overlap.py` under torchrun: each stage in a process and on a GPU of its own, over NCCL."""

import argparse
import gzip
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common.spans import exposed
from benchmarks.common.timing import elapsed_ms
from benchmarks.pipeline.stage import ORDERS, Sizes, Stage, file_name
from megatron_mhc import MHCConfig


class RealStage(Stage):
    """This rank's stage of the model, and steps of the whole pipeline."""

    def __init__(self, sizes: Sizes, mhc: MHCConfig, microbatches: int) -> None:
        super().__init__(sizes, mhc, microbatches)
        shape = (sizes.batch, sizes.sequence)
        generator = torch.Generator().manual_seed(2)
        self.tokens = torch.randint(0, 1024, shape, generator=generator).cuda()
        self.losses: list[Any] = []

    def step(self) -> None:
        """One step; gradients stay in the parameters."""
        self.clear()

        def forward_step(_: Any, model: torch.nn.Module) -> tuple[Any, Any]:
            output = model(self.tokens, self.positions, self.sizes.mask(), labels=self.tokens)

            def loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                mean = losses.float().mean()
                return mean, {"loss": mean.detach().clone()}

            return output, loss

        self.losses = self.schedule(forward_step, forward_only=False)

    def time(self, steps: int) -> tuple[float, float]:
        """Milliseconds of the slowest rank, a median, after two that warm up; the fullest's GiB."""
        times = []
        for index in range(steps + 2):
            if index == 2:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            dist.barrier()
            times.append(elapsed_ms(self.step))
        mine = (statistics.median(times[2:]), torch.cuda.max_memory_allocated() / 2**30)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        return max(ms for ms, _ in ranks), max(gib for _, gib in ranks)

    def profile(self, path: Path) -> dict[str, float]:
        """A step's chrome trace of this rank, and what `exposed` finds in it."""
        self.step()
        torch.cuda.synchronize()
        dist.barrier()
        with torch.profiler.profile() as records:
            self.step()
            torch.cuda.synchronize()
        records.export_chrome_trace(str(path))
        found = exposed(path)
        with path.open("rb") as plain, gzip.open(f"{path}.gz", "wb") as packed:
            shutil.copyfileobj(plain, packed)
        path.unlink()
        return found


def measure(sizes: Sizes, mhc: MHCConfig, options: argparse.Namespace) -> None:
    """The table of all orders, in rounds, and a trace of each rank in the folder `--out`."""
    stage = RealStage(sizes, mhc, options.microbatches)
    steps: dict[str, list[float]] = {order: [] for order in ORDERS}
    peaks = dict.fromkeys(ORDERS, 0.0)
    losses: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for order in ORDERS:
            stage.choose_order(order)
            step, peak = stage.time(options.steps)
            steps[order].append(step)
            peaks[order] = max(peaks[order], peak)
            losses[order] = [entry["loss"].item() for entry in stage.losses]
    assert all(found == losses["stock order"] for found in losses.values()), losses
    rows: dict[str, Any] = {}
    for order in ORDERS:
        rows[order] = {
            "step_ms": statistics.median(steps[order]),
            "step_ms_by_round": steps[order],
            "peak_gib": peaks[order],
        }
        if options.out and not options.cpu:
            rows[order]["p2p_by_rank"] = profiles(stage, order, options.out)
    if dist.get_rank() == 0:
        print_table(rows, options)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "pipeline.json").write_text(json.dumps(rows, indent=1))


def profiles(stage: RealStage, order: str, out: Path) -> list[dict[str, float]]:
    """What `RealStage.profile` finds, by rank."""
    out.mkdir(parents=True, exist_ok=True)
    stage.choose_order(order)
    mine = stage.profile(out / f"{file_name(order)}-rank-{dist.get_rank()}.json")
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return ranks


def print_table(rows: dict[str, Any], options: argparse.Namespace) -> None:
    """A line an order."""
    world = dist.get_world_size()
    print(f"{world} stages, {options.microbatches} microbatches, {options.rounds} rounds")
    print(f"{'order':22}{'step ms':>9}{'spread':>8}{'peak GiB':>9}  p2p kernels alone, by rank")
    for order, row in rows.items():
        alone = [f"{found['p2p_alone_ms']:.1f} ms" for found in row.get("p2p_by_rank", [])]
        spread = max(row["step_ms_by_round"]) - min(row["step_ms_by_round"])
        print(
            f"{order:22}{row['step_ms']:9.1f}{spread:8.1f}{row['peak_gib']:9.1f}"
            f"  {', '.join(alone) or '-'}"
        )
