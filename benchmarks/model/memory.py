"""Memory and step time of mHC with selective recompute, beside the formula, on one GPU.

    python benchmarks/model/memory.py --json memory.json --png memory.png

The model of `layers.py` (Transformer Engine's spec, bf16, one microbatch): ordinary,
mHC, mHC with recompute in blocks of several lengths, and mHC under Megatron's full recompute. All
are in memory at once and take turns a step at a time, so that a clock that drifts drifts for all.
Step times are medians over the rounds; "over ordinary" is the median of each round's own ratio, and
low and high are its tenths and nine tenths. `--blocks auto` has fewer models.

What is measured, in GiB beyond the ordinary model:
  starts   n-wide storages among the tensors saved for the backward: the block starts
  rest     everything else that is held between forward and backward
  rebuilt  what allocating grows by when the last block is rebuilt ahead of the backward
  sum      of the three; the formula's terms are `bytes_a_token` of costs.recompute_plan.Plan
  peak     the allocator's peak in a step, transient gradients of the streams included
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from benchmarks.common import command_line, gpt, plotting
from benchmarks.common.timing import elapsed_ms
from benchmarks.common.turns import in_turn, ratio
from benchmarks.kernels.site_tiles import use_tile
from benchmarks.model.gpt import build, loss_of, random_tokens
from megatron_mhc import MHCConfig, kernels
from megatron_mhc.costs.recompute_plan import Plan, plan_of
from megatron_mhc.kernels.triton import tiles
from megatron_mhc.pipeline.state import rebuild_ahead

GIB = 2**30
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


class Case:
    """One model of the comparison, its step times and its memory."""

    def __init__(self, options: argparse.Namespace, mhc: MHCConfig | None, **settings: Any) -> None:
        self.options = options
        self.model = build(options, mhc, **settings)
        self.plan: Plan | None = plan_of([self.model])
        self.tokens = random_tokens(options)
        self.wide = options.batch * options.sequence * options.hidden * 2  # bytes of one stream
        self.streams = 0 if mhc is None else mhc.num_streams

    def forward(self) -> torch.Tensor:
        """The loss of the one microbatch."""
        return loss_of(self.model, self.options, self.tokens)

    def step(self) -> float:
        """Milliseconds of a forward and a backward."""
        return elapsed_ms(lambda: self.forward().backward())

    def memory(self) -> dict[str, float]:
        """GiB: held, starts (a part of held), rebuilt; and the peak of a step."""
        saved: dict[int, Any] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage
            return tensor

        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = self.forward()
        held = torch.cuda.memory_allocated() - before
        loss.backward()
        del loss

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.forward()
        wide = [s for s in saved.values() if s.nbytes() == self.streams * self.wide]
        starts = sum(s.nbytes() for s in wide) if self.streams else 0
        saved.clear()
        wide.clear()
        loss.backward()
        del loss

        loss = self.forward()
        base = torch.cuda.memory_allocated()
        rebuild_ahead(self.model)
        rebuilt = torch.cuda.memory_allocated() - base
        loss.backward()
        del loss

        torch.cuda.reset_peak_memory_stats()
        self.forward().backward()
        peak = torch.cuda.max_memory_allocated() - before
        sizes = {"held": held, "starts": starts, "rebuilt": rebuilt, "peak": peak}
        return {name: size / GIB for name, size in sizes.items()}


def compare(case: Case, memory: dict[str, float], ordinary: dict[str, float]) -> dict[str, float]:
    """A case's memory beyond the ordinary model's, in GiB, and what the formula says of it."""
    row = {
        "held": memory["held"],
        "starts": memory["starts"],
        "rest": memory["held"] - ordinary["held"] - memory["starts"],
        "rebuilt": memory["rebuilt"],
        "peak": memory["peak"] - ordinary["peak"],
    }
    row["sum"] = row["starts"] + row["rest"] + row["rebuilt"]
    if case.plan is not None:
        tokens = case.options.batch * case.options.sequence
        terms = {name: size * tokens / GIB for name, size in case.plan.bytes_a_token.items()}
        row |= {
            "blocks_of": case.plan.layers,
            "formula_starts": terms.pop("block starts"),
            "formula_rebuilt": terms.pop("rebuilt block"),
            "formula_rest": sum(terms.values()),
        }
        row["formula"] = sum(row[f"formula_{part}"] for part in ("starts", "rest", "rebuilt"))
        row["sum_over_formula"] = row["sum"] / row["formula"]
    return row


def replay(sites: int, tokens: int, width: int, n: int = 4) -> dict[int, float]:
    """Microseconds a site of the rebuild kernel alone, by the sites that one launch goes through.

    With one, every site reads the streams that the one before wrote: 2n + 2 passes of [T, C]; with
    more they stay in registers: towards n + 2.
    """
    like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(tokens, n, width, **like)
    h_pre = [torch.rand(tokens, n, device="cuda") for _ in range(sites)]
    ended = [
        kernels.Mixing(
            torch.randn(tokens, width, **like),
            torch.rand(tokens, n, device="cuda"),
            torch.rand(tokens, n, n, device="cuda").softmax(-1),
        )
        for _ in range(sites - 1)
    ]
    ys = [torch.empty_like(x) for _ in ended]
    us = [torch.empty(tokens, width, **like) for _ in h_pre]
    tile, result = tiles.rebuild(n, width, torch.bfloat16), {}

    def with_boundaries(splits: int) -> tuple[int, ...]:
        return tile.tokens, tile.channels, splits, tile.warps, tile.stages

    for boundaries in (1, 2, 4, sites):
        use_tile("rebuild", with_boundaries(boundaries))
        launch = partial(kernels.rebuild, x, h_pre, ended, ys=ys, us=us, backend="triton")
        times = [elapsed_ms(launch) for _ in range(13)]
        result[boundaries] = 1000 * statistics.median(times[3:]) / sites
    use_tile("rebuild", with_boundaries(tile.splits))
    return result


COLUMNS = (
    *("step_ms", "over_ordinary", "low", "high", "held", "peak"),
    *("starts", "formula_starts", "rest", "formula_rest", "rebuilt", "formula_rebuilt"),
    *("sum", "formula", "sum_over_formula"),
)


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown, a row a case."""
    head = "| model | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |"
    lines = [head, "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, row in results.items():
        cells = (f"{row[column]:.3f}" if column in row else "" for column in COLUMNS)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, float]], file: Path) -> None:
    """Memory beyond the ordinary model, with the formula's, and step time."""
    names = list(results)
    figure, (left, right) = plotting.pyplot().subplots(1, 2, figsize=(11, 4), layout="constrained")
    # full recompute holds less than the ordinary model, by more than all of this: the table has it
    wider = [name for name in names if results[name]["sum"] > 0]
    bottom = [0.0] * len(wider)
    parts = {
        "starts": "block starts",
        "rest": "rest: F's output, coefficients",
        "rebuilt": "rebuilt",
    }
    for part, label in parts.items():
        heights = [results[name][part] for name in wider]
        left.bar(wider, heights, bottom=bottom, label=label)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    predicted = [name for name in names if "formula" in results[name]]
    left.plot(
        predicted, [results[name]["formula"] for name in predicted], "k_", ms=24, label="formula"
    )
    left.set_ylabel("beyond the ordinary model, GiB")
    left.legend()
    right.bar(names, [results[name]["step_ms"] for name in names], color="tab:gray")
    right.set_ylabel("forward and backward, ms (median)")
    for axes in (left, right):
        axes.tick_params(axis="x", rotation=60)
    figure.savefig(file, dpi=110)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser(__doc__)
    command_line.add_numbers(parser, command_line.GPT | {"batch": 2, "rounds": 20})
    parser.add_argument(
        "--blocks", default="1,2,4,auto", help="layers a block, by commas (default: 1,2,4,auto)"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--png", type=Path, help="draw them here")
    return command_line.parse_on_gpu(parser)


def wanted(blocks: str) -> dict[str, tuple[MHCConfig | None, dict[str, Any]]]:
    """The cases by name: mHC's settings, and more of TransformerConfig's."""
    cases: dict[str, tuple[MHCConfig | None, dict[str, Any]]] = {
        "ordinary": (None, {}),
        "mHC": (MHCConfig(backend="triton"), {}),
    }
    for text in blocks.split(","):
        number = text if text == "auto" else int(text)
        cases[f"recompute {text}"] = (MHCConfig(backend="triton", recompute=number), {})
    return cases | {"full recompute": (MHCConfig(backend="triton"), FULL)}


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """A row a case, from rounds in which each takes one step."""
    cases = {
        name: Case(options, mhc, **settings)
        for name, (mhc, settings) in wanted(options.blocks).items()
    }
    memories: dict[str, dict[str, float]] = {}
    for name, case in cases.items():
        for _ in range(2):  # warms up: kernels, the allocator, gradients
            case.step()
        memories[name] = case.memory()
    times = in_turn({name: case.step for name, case in cases.items()}, options.rounds)
    rows = {}
    for name, case in cases.items():
        beside = ratio(times[name], times["ordinary"])
        rows[name] = {
            "step_ms": statistics.median(times[name]),
            "over_ordinary": beside.median,
            "low": beside.low,
            "high": beside.high,
            **compare(case, memories[name], memories["ordinary"]),
        }
    return rows


def main() -> None:
    """Measure every case, print the table, and write what was asked for."""
    options = parse()
    gpt.join()
    results = measure(options)
    print(torch.cuda.get_device_name(), torch.__version__)
    print(table(results))
    replayed = replay(8, options.batch * options.sequence, options.hidden)
    for sites, microseconds in replayed.items():
        print(f"rebuild kernel, {sites} sites a launch: {microseconds:.1f} us a site")
    if options.json:
        asked = {k: v for k, v in vars(options).items() if k not in ("json", "png")}
        machine = {"device": torch.cuda.get_device_name(), "replay_us": replayed}
        options.json.write_text(json.dumps({"options": asked, **machine, **results}))
    if options.png:
        plot(results, options.png)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
