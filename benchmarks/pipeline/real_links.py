"""`pipeline.py` under torchrun: each stage in a process and on a GPU of its own, over NCCL."""

import argparse
import gzip
import json
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config

from benchmarks.common.spans import exposed
from benchmarks.pipeline.stage import Sizes, build_stage
from megatron_mhc import MHCConfig
from megatron_mhc.model.config_marks import IN_FLIGHT
from megatron_mhc.pipeline.state import state_of


class RealStage:
    """This rank's stage of the model, and steps of the whole pipeline in either order."""

    def __init__(self, sizes: Sizes, mhc: MHCConfig, microbatches: int) -> None:
        self.sizes, self.microbatches = sizes, microbatches
        self.model, _ = build_stage(sizes, mhc)
        self.config = get_model_config(self.model)
        shape = (sizes.batch, sizes.sequence)
        generator = torch.Generator().manual_seed(2)
        self.tokens = torch.randint(0, 1024, shape, generator=generator).cuda()
        self.positions = torch.arange(sizes.sequence, device="cuda")[None]
        self.losses: list[Any] = []

    def choose(self, in_flight: int) -> None:
        """The order of the steps that follow: stock order, or so many microbatches ahead."""
        setattr(self.config, IN_FLIGHT, in_flight)
        state_of(self.model).side_streams = None

    def step(self) -> None:
        """One step; gradients stay in the parameters."""
        for parameter in self.model.parameters():
            parameter.grad = None

        def forward_step(_: Any, model: torch.nn.Module) -> tuple[Any, Any]:
            output = model(self.tokens, self.positions, self.sizes.mask(), labels=self.tokens)

            def loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                mean = losses.float().mean()
                return mean, {"loss": mean.detach().clone()}

            return output, loss

        self.losses = schedules.forward_backward_pipelining_without_interleaving(
            forward_step_func=forward_step,
            data_iterator=None,
            model=self.model,
            num_microbatches=self.microbatches,
            seq_length=self.sizes.sequence,
            micro_batch_size=self.sizes.batch,
            forward_only=False,
        )

    def time(self, steps: int) -> tuple[float, float]:
        """Milliseconds of the slowest rank, a median, after two that warm up; the fullest's GiB."""
        times = []
        for index in range(steps + 2):
            if index == 2:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            dist.barrier()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.step()
            end.record()
            torch.cuda.synchronize()
            if index >= 2:
                times.append(begin.elapsed_time(end))
        mine = (statistics.median(times), torch.cuda.max_memory_allocated() / 2**30)
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


def measure(
    sizes: Sizes, mhc: MHCConfig, modes: Mapping[str, int], options: argparse.Namespace
) -> None:
    """The table of all modes, in rounds, and a trace of each rank in the folder `--out`."""
    rank, world = dist.get_rank(), dist.get_world_size()
    stage = RealStage(sizes, mhc, options.microbatches)
    steps: dict[str, list[float]] = {mode: [] for mode in modes}
    peaks = dict.fromkeys(modes, 0.0)
    losses: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for mode, in_flight in modes.items():
            stage.choose(in_flight)
            step, peak = stage.time(options.steps)
            steps[mode].append(step)
            peaks[mode] = max(peaks[mode], peak)
            losses[mode] = [entry["loss"].item() for entry in stage.losses]
    assert all(found == losses["stock order"] for found in losses.values()), losses
    rows: dict[str, Any] = {}
    for mode, in_flight in modes.items():
        row: dict[str, Any] = {
            "step_ms": statistics.median(steps[mode]),
            "step_ms_by_round": steps[mode],
            "peak_gib": peaks[mode],
        }
        if options.out and not options.cpu:
            options.out.mkdir(parents=True, exist_ok=True)
            stage.choose(in_flight)
            name = f"{mode.replace(', ', '-').replace(' ', '-')}-rank-{rank}.json"
            mine = stage.profile(options.out / name)
            ranks: list[Any] = [None] * world
            dist.all_gather_object(ranks, mine)
            row["p2p_by_rank"] = ranks
        rows[mode] = row
    if rank == 0:
        print(f"{world} stages, {options.microbatches} microbatches, {options.rounds} rounds")
        print(f"{'order':22}{'step ms':>9}{'spread':>8}{'peak GiB':>9}  p2p kernels alone, by rank")
        for mode, row in rows.items():
            alone = [f"{found['p2p_alone_ms']:.1f} ms" for found in row.get("p2p_by_rank", [])]
            spread = max(row["step_ms_by_round"]) - min(row["step_ms_by_round"])
            print(
                f"{mode:22}{row['step_ms']:9.1f}{spread:8.1f}{row['peak_gib']:9.1f}"
                f"  {', '.join(alone) or '-'}"
            )
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "pipeline.json").write_text(json.dumps(rows, indent=1))
