"""How much of a pipeline's communication `--mhc-overlap-p2p` hides: one stage, on one GPU.

    python benchmarks/pipeline/overlap.py --out runs/pipeline     # times, traces, a timeline
    python benchmarks/pipeline/overlap.py --equal 200             # stock order and ours, bit by bit
    torchrun --nproc-per-node 2 benchmarks/pipeline/overlap.py    # real neighbours, over NCCL

Under torchrun every process is a stage (`real_links.py`), `--layers` on each. In one process the
stage is real and its neighbours are not (`neighbours.py`). Stock order is Megatron's own 1F1B
function without its host synchronisations; exposed is what a step takes longer than over links that
take no time, a median over rounds. "ready" neighbours have every message waiting: what is exposed
is this stage's doing. "computing" neighbours are as fast as this one, in the same schedule: a
gradient's way back is in.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import command_line

SIZES = command_line.GPT | {"layers": 4}
SMALL = {"hidden": 1024, "ffn": 2816, "heads": 16, "groups": 4, "sequence": 1024}
"""With --equal, where nothing else is said: small kernels, much of the time at the ends."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser(__doc__)
    pipeline = {"batch": 1, "stages": 4, "stage": 1, "microbatches": 12}
    command_line.add_numbers(parser, SIZES | pipeline | {"steps": 4, "rounds": 3})
    parser.add_argument("--gigabytes", type=float, default=25, help="10^9 bytes/s of a link")
    parser.add_argument("--latency-us", type=float, default=20, help="of a message")
    kinds = ("ready", "computing")
    parser.add_argument("--neighbours", nargs="+", default=kinds, choices=kinds, help="see above")
    parser.add_argument("--equal", type=int, default=0, metavar="N", help="compare N steps instead")
    parser.add_argument("--recompute", help="layers a block, or auto: rebuild streams (off)")
    parser.add_argument("--spec", choices=("te", "local"), default="te", help="Megatron's layers")
    parser.add_argument("--out", type=Path, help="a folder for JSON, traces and the timeline")
    parser.add_argument("--cpu", action="store_true", help="rehearse without a GPU")
    options = parser.parse_args()
    if options.equal:
        for name, value in SMALL.items():
            if getattr(options, name) == SIZES[name]:
                setattr(options, name, value)
        options.microbatches = min(options.microbatches, 6)
    return options


def prepare(options: argparse.Namespace) -> None:
    """What has to be so before Megatron is imported."""
    if options.cpu:
        from megatron_mhc.patches import cpu

        cpu.enter()
    if options.equal:
        # Transformer Engine's attention has a faster backward that adds in any order
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"


def emulate(stage: Any, options: argparse.Namespace) -> None:
    """The table; with --out JSON, and on a GPU traces and the timeline of a step in each order."""
    from benchmarks.pipeline import emulated, records
    from benchmarks.pipeline.neighbours import Pace
    from benchmarks.pipeline.stage import ORDERS

    rows = emulated.measure(stage, options)
    if not options.out:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.cpu:
        stage.microbatches = min(stage.microbatches, 8)
        pace = Pace(options.gigabytes, options.latency_us, **rows["busy"])
        profiles = {order: records.profile(stage, order, pace, options.out) for order in ORDERS}
        records.draw(profiles, options.out / "timeline.png")
        for order, result in profiles.items():
            rows[f"profiled, {order}"] = {k: v for k, v in result.items() if k != "spans"}
    (options.out / "pipeline.json").write_text(json.dumps(rows, indent=1))


def main() -> None:
    """Measure, or compare."""
    options = parse()
    prepare(options)
    import torch.distributed as dist

    from benchmarks.common import gpt
    from benchmarks.pipeline import real_links
    from benchmarks.pipeline.emulated import EmulatedStage
    from benchmarks.pipeline.equal import train_equal
    from benchmarks.pipeline.stage import Sizes
    from megatron_mhc import MHCConfig

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank, world = gpt.join("gloo" if options.cpu and several else "nccl")
    sizes = Sizes(**{name: getattr(options, name) for name in (*SIZES, "batch", "spec")})
    sizes.stages, sizes.stage = (world, rank) if several else (options.stages, options.stage)
    recompute = options.recompute
    mhc = MHCConfig(
        overlap_p2p=True,
        backend="torch" if options.cpu else "triton",
        recompute=int(recompute) if recompute and recompute.isdecimal() else recompute,
    )
    if several:
        real_links.measure(sizes, mhc, options)
    elif options.equal:
        train_equal(EmulatedStage(sizes, mhc, options.microbatches), options)
    else:
        emulate(EmulatedStage(sizes, mhc, options.microbatches), options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
