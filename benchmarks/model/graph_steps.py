"""Steps of the paper's layers on one GPU, ordinary and mHC, with CUDA graphs of layers and without.

    python benchmarks/model/graph_steps.py --out runs/graph_steps
    python benchmarks/model/graph_steps.py --micro-batch 2 --rounds 1

MLA, 8 layers (the first one dense), 12 experts of 1536 and a shared one, C 2560, sequence 4096,
two microbatches a step. All variants are trained in one launch, one after the other, round after
round; "ratio" is mHC's step over the ordinary model's with the same graphs.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import command_line
from benchmarks.multi_gpu.launches import Bench, Run
from benchmarks.multi_gpu.models import PAPER

MICROBATCHES = 2
"""Each has graphs of its own, some GiB a layer."""
STEPS = 16
_GRAPHS = "--cuda-graph-impl transformer_engine --cuda-graph-modules"
GRAPHS = {
    "none": "",
    "attn": f"{_GRAPHS} attn",
    "attn-router": f"{_GRAPHS} attn moe_router moe_preprocess",
}


def table(runs: dict[str, Run], group: str, graphs: list[str]) -> str:
    """A row for each of the models and graphs."""
    lines = [f"{'graphs':14}{'ordinary ms':>13}{'mHC ms':>9}{'ratio':>8}{'GiB':>7}{'GiB':>7}"]
    for name in graphs:
        rows = [runs.get(f"{group}: {model}-{name}") for model in ("ordinary", "mhc")]
        ordinary, mhc = (row or Run("", 1, failure="not run") for row in rows)
        if failure := ordinary.failure or mhc.failure:
            lines.append(f"{name:14}  FAILED ({failure})")
            continue
        ratio = mhc.step_ms / ordinary.step_ms
        lines.append(
            f"{name:14}{ordinary.step_ms:13.1f}{mhc.step_ms:9.1f}{ratio:8.3f}"
            f"{ordinary.peak_gib:7.1f}{mhc.peak_gib:7.1f}  {ordinary.remark} | {mhc.remark}"
        )
    return "\n".join(lines)


def main() -> int:
    """Train all, print the table; the number of failures is the exit status."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/graph_steps"), help="logs and table")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="of all variants (default: 3)")
    parser.add_argument("--graphs", nargs="+", default=list(GRAPHS), choices=GRAPHS)
    parser.add_argument("--limit", type=float, default=560, help="seconds the call may take")
    options = command_line.parse_on_gpu(parser)
    launch = {"cpu": False, "each": options.limit, "jobs": 1, "ranks_per_gpu": 1}
    bench = Bench(argparse.Namespace(**vars(options), **launch))
    variants = {
        f"{model}-{name}": f"{flags} {GRAPHS[name]}"
        for name in options.graphs
        for model, flags in (("ordinary", ""), ("mhc", "--mhc"))
    }
    sizes = (
        f"--micro-batch-size {options.micro_batch}"
        f" --global-batch-size {MICROBATCHES * options.micro_batch}"
    )
    group = f"micro-batch-{options.micro_batch}"
    bench.rounds(
        group, 1, f"{PAPER} {sizes} --te-rng-tracker --log-memory-interval 5", variants,
        number=options.rounds, iterations=STEPS,
        # what runs use that want speed
        NVTE_ALLOW_NONDETERMINISTIC_ALGO="1",
    )  # fmt: skip
    text = table(bench.runs, group, options.graphs)
    (bench.out / "table.txt").write_text(text + "\n")
    print(text)
    return sum(bool(run.failure) for run in bench.runs.values())


if __name__ == "__main__":
    sys.exit(main())
