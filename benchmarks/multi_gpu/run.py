"""Training runs on several GPUs of one host, through `examples/pretrain_gpt.py`, and a table.

    benchmarks/multi_gpu/run.sh --out runs/multi_gpu
    benchmarks/multi_gpu/run.sh --parts pipelines --only one pp pp-overlap --steps 20

`--ranks-per-gpu 4` gives every GPU several ranks, each a host of its own to NCCL, which then goes
over sockets: on one GPU it shows what four stages do over NCCL, and nothing about time.

Each run is a launch of its own with a time limit: one that fails is a line in the table and does
not stop the others. What is timed runs last and alone, the rest `--jobs` launches at a time. The
parts, a file each in `parts/`:

* pipelines: losses of all GPUs as stages (at most 4, data parallel beyond) against one GPU; stock
  order, overlap and overlap with 2 in flight against each other, digit for digit (losses and
  gradient norms), also with timers on, with late outputs (`late_ends.py`), and with stages without
  layers (`bare`);
* pipelines_beside: pipelines beside data and tensor parallelism, and of three stages (four GPUs and
  more);
* other_parallelism: MoE over expert parallel ranks, TP with sequence parallelism, CP: losses
  against one GPU; Megatron-FSDP against the distributed optimizer;
* paper: the paper's layers (MLA, mixture of experts, distributed optimizer with both overlaps),
  pipeline and expert parallel: recompute and overlap against stock order, digit for digit;
* expert_overlap: the paper's layers with expert-parallel overlap;
* layer_graphs: the paper's layers in two stages, with CUDA graphs of layers;
* resume: save on several GPUs, resume on two and on one, and back, with the distributed optimizer,
  and in the layout that saved;
* step_times: steps of larger models (dense; the paper's layers with all 72 experts): ordinary, mHC,
  with overlap, with recompute, with expert-parallel overlap, with graphs, in one launch a layout,
  three rounds (`rounds.py`); a dense model on 1, 2, 4, 8 data parallel ranks (`weak-N`);
  NCCL's send and receive kernels (messages between stages, exchanges
  between experts) that no compute kernel runs beside, from traces of a further round.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import command_line
from benchmarks.multi_gpu.launches import Bench, Part
from benchmarks.multi_gpu.models import MOE, save_start, small_size
from benchmarks.multi_gpu.parts.expert_overlap import expert_overlap
from benchmarks.multi_gpu.parts.layer_graphs import layer_graphs
from benchmarks.multi_gpu.parts.other_parallelism import other_parallelism
from benchmarks.multi_gpu.parts.paper import paper
from benchmarks.multi_gpu.parts.pipelines import pipelines, pipelines_beside
from benchmarks.multi_gpu.parts.resume import resume
from benchmarks.multi_gpu.parts.step_times import LAYOUTS, TRACED, VARIANTS, step_times

CORRECT: dict[str, Callable[[Bench, int, str], Part]] = {
    "pipelines": pipelines,
    "pipelines_beside": pipelines_beside,
    "other_parallelism": other_parallelism,
    "paper": paper,
    "resume": resume,
    "expert_overlap": expert_overlap,
    "layer_graphs": layer_graphs,
}
"""Parts whose launches may run side by side: nothing in them is timed."""
PARTS = (*CORRECT, "step_times")
OWN_START = {"paper", "resume", "expert_overlap", "layer_graphs"}
"""Parts whose runs need no weights that one GPU saved."""


def command() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/multi_gpu"), help="logs and table")
    parser.add_argument("--cpu", action="store_true", help="rehearse on CPU processes, tiny")
    parser.add_argument("--gpus", type=int, help="how many to use (default: all)")
    parser.add_argument("--ranks-per-gpu", type=int, default=1, help="share each GPU (no times)")
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART",
        help=f"of {', '.join(PARTS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=100, help="of a pipeline's longer runs")
    parser.add_argument("--rounds", type=int, default=3, help="of what is timed")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="these runs of the parts")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", choices=VARIANTS,
        help=f"these of what is timed: {', '.join(VARIANTS)} (default: all that a layout has)",
    )  # fmt: skip
    parser.add_argument(
        "--trace", nargs="*", metavar="LAYOUT", default=TRACED, choices=LAYOUTS,
        help=f"layouts that are timed, traced in a further round (default: {' '.join(TRACED)})",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=4, help="launches at a time, where not timed")
    parser.add_argument("--each", type=float, default=240, help="seconds a run may take")
    parser.add_argument("--limit", type=float, default=560, help="seconds the call may take")
    parser.add_argument("--timing", type=float, default=230, help="of them kept for step times")
    return parser


def number_of_gpus(options: argparse.Namespace) -> int:
    """How many ranks a launch may have.

    Raises:
        SystemExit: too few for what is asked.
    """
    if options.cpu:
        gpus = options.gpus or 2
    else:
        import torch

        gpus = options.gpus or torch.cuda.device_count() * options.ranks_per_gpu
    if gpus < 2 and options.parts != ["paper"]:
        sys.exit(f"multi_gpu/run.py: there is {gpus} GPU here and this needs 2; --cpu rehearses")
    return gpus


def chosen(
    parser: argparse.ArgumentParser, options: argparse.Namespace, parts: list[Part]
) -> list[Callable[[], Any]]:
    """The launches of these parts, or those that --only names.

    Raises:
        SystemExit: it names one that is not there.
    """
    launches = [launch for own, _ in parts for launch in own]
    if not options.only:
        return launches
    if "resume" in options.parts:
        parser.error("--only does not go with --parts resume")
    # each launch is a partial of `train`, whose first argument is the run's name
    names: Any = {launch: launch.args[0] for launch in launches}  # type: ignore[attr-defined]
    known = {*names.values()} | ({*LAYOUTS} if "step_times" in options.parts else set())
    if unknown := {*options.only} - known:
        parser.error(f"--only: no {', '.join(unknown)} among {', '.join(sorted(known))}")
    return [launch for launch in launches if names[launch] in options.only]


def table(bench: Bench) -> str:
    """A line a run."""
    lines = [f"{'run':24}{'GPUs':>5}{'s':>6}{'step ms':>9}{'GiB':>7}{'last loss':>14}  what"]
    for run in bench.runs.values():
        last = run.losses[-1] if run.losses else "-"
        what = f"FAILED ({run.failure}) {run.remark}" if run.failure else run.remark
        lines.append(
            f"{run.name:24}{run.gpus:5}{run.seconds:6.0f}{run.step_ms:9.1f}{run.peak_gib:7.1f}"
            f"{last:>14}  {what}"
        )
    return "\n".join([*lines, f"{time.time() - bench.begin:.0f} s in all"])


def main() -> int:
    """Run the parts, print the table; the number of failures is the exit status."""
    parser = command()
    options = parser.parse_args()
    bench = Bench(options)
    gpus = number_of_gpus(options)
    small = small_size(bench, gpus)
    parts = [CORRECT[name](bench, gpus, small) for name in options.parts if name in CORRECT]
    launches = chosen(parser, options, parts)
    timed = "step_times" in options.parts
    if launches:
        wanted = timed and (not options.only or {*options.only} & {*LAYOUTS})
        bench.reserved = options.timing if wanted else 0.0
        if not {*options.parts} <= OWN_START:
            starts = {"dense": f"{small} --mhc", "moe": f"{small} {MOE} --mhc"}
            bench.side_by_side([partial(save_start, bench, *start) for start in starts.items()])
        bench.side_by_side(launches)
        for check in (check for _, checks in parts for check in checks):
            check()
    if timed:
        bench.reserved = 0.0
        step_times(bench, gpus)
    text = table(bench)
    print(text)
    (bench.out / "table.txt").write_text(text + "\n")
    return sum(bool(run.failure) for run in bench.runs.values())


if __name__ == "__main__":
    sys.exit(main())
