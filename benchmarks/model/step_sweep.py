"""What mHC costs a step of the two cluster examples, over stages and micro-batches: a picture.

    python benchmarks/model/step_sweep.py --output sweep.png
    python benchmarks/model/step_sweep.py --gpus 256 --links 25 --mfu 0.3

No GPU needed: flags are the examples' own, figures those of `doctor --args` (docs/step-costs.md),
with sublayers shared out evenly.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import command_line, plotting

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {"GPT, 8B": "examples/gpt/cluster.sh", "MoE, 27B": "examples/moe/cluster.sh"}
STAGES = (1, 2, 4, 8, 16)
MICRO_BATCHES = (1, 2, 4)
OWN_SPLIT = {
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
}
"""Flags that one stage does not take."""


def flags_of(script: str, gpus: int) -> list[str]:
    """The flags that an example gives Megatron."""
    environment = {**os.environ, "CHECK": "1", "PYTHON": "echo", "NODES": str(gpus // 8)}
    printed = subprocess.run(
        ["bash", script], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()[-1]
    return printed.partition("--args ")[2].split()


def shared_out(sublayers: int, stages: int) -> list[list[int]]:
    """Sublayers of each stage, as even as they get."""
    least, more = divmod(sublayers, stages)
    return [[least + (stage < more)] for stage in range(stages)]


def shares(flags: list[str], options: Any, stages: int, micro_batch: int) -> Any:
    """mHC over ordinary in stock order and with overlap, for each link; None where the stages do
    not divide the layers, or the microbatches the sequences."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from megatron_mhc.costs.kernel_passes import CARDS
    from megatron_mhc.costs.step_costs import estimate
    from megatron_mhc.start.flags import config_from_arguments
    from megatron_mhc.tools import dry_run, step_page

    name = "--tensor-model-parallel-size"
    tensor = int(flags[flags.index(name) + 1]) if name in flags else 1
    replicas = options.gpus // (stages * tensor)
    if options.sequences % (replicas * micro_batch):
        return None
    if stages == 1:
        flags = [flag for flag in flags if flag not in OWN_SPLIT]
    more = f"--pipeline-model-parallel-size {stages} --micro-batch-size {micro_batch}"
    more += f" --global-batch-size {options.sequences}"
    os.environ["WORLD_SIZE"] = str(options.gpus)
    destroy_num_microbatches_calculator()
    try:
        args = dry_run.parse([*flags, *more.split()])
    except dry_run.FlagsError as error:
        print(f"  {stages} stages, micro-batch {micro_batch}: {error}", file=sys.stderr)
        return None
    tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
    tokens //= args.tensor_model_parallel_size if args.sequence_parallel else 1
    mhc = config_from_arguments(args)
    run = step_page.run_of(args, mhc, shared_out(2 * args.num_layers, stages), tokens)
    card = CARDS[options.card]
    found = [estimate(run, card, link, options.mfu) for link in options.links]
    return [(e.messages / e.ordinary - 1, e.overlap / e.ordinary - 1) for e in found]


def draw(rows: dict[tuple[str, int], dict[int, Any]], options: Any) -> None:
    """A pane an example and link, a line a micro-batch: solid in stock order, dashed overlapped."""
    links = options.links
    figure, panes = plotting.pyplot().subplots(
        len(links), len(EXAMPLES), figsize=(10, 3.4 * len(links)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    highest = max(max(map(max, share)) for found in rows.values() for share in found.values())
    for row, link in enumerate(links):
        for pane, name in zip(panes[row], EXAMPLES, strict=True):
            for color, micro_batch in enumerate(MICRO_BATCHES):
                found = rows[name, micro_batch]
                for index, style in enumerate(("-", "--")):
                    label = f"micro-batch {micro_batch}" + ", overlap" * index
                    pane.plot(
                        range(len(found)), [100 * share[row][index] for share in found.values()],
                        style, color=f"C{color}", marker="o", markersize=4, label=label,
                    )  # fmt: skip
                pane.set_xticks(range(len(found)), map(str, found))
            pane.set_title(f"{name}, {link:g} GB/s between stages", fontsize=10)
            pane.set_ylim(0, 108 * highest)
            pane.grid(alpha=0.3)
        panes[row][0].set_ylabel("added to a step, %")
    for pane in panes[-1]:
        pane.set_xlabel("pipeline stages")
    panes[0][0].legend(fontsize=7, ncols=2, loc="upper left", framealpha=1)
    figure.suptitle(
        f"What mHC adds to a step on {options.gpus:,} {options.card}s, {options.sequences:,}"
        f" sequences a step, {options.mfu:.0%} MFU: a model, not measured",
        fontsize=11,
    )
    figure.savefig(options.output, dpi=120)


def main() -> None:
    """Reckon all, print a table, draw."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--gpus", type=int, default=2048, help="(default: 2048)")
    parser.add_argument("--sequences", type=int, default=8192, help="of a step (default: 8192)")
    parser.add_argument("--card", default="H100")
    parser.add_argument(
        "--links", type=float, nargs="+", default=[50.0, 12.5], help="GB/s (default: 50 and 12.5)"
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="(default: 0.4)")
    parser.add_argument("--output", type=Path, default=Path("step_sweep.png"))
    options = parser.parse_args()
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "RANK": "0"}
    from megatron_mhc.patches import cpu

    cpu.enter()
    from megatron_mhc.start.activate import activate

    activate()
    rows: dict[tuple[str, int], dict[int, Any]] = {}
    print(f"{'model':10}{'micro-batch':>12}{'stages':>8}  {'stock order and overlap, each link'}")
    for name, script in EXAMPLES.items():
        flags = flags_of(script, options.gpus)
        for micro_batch in MICRO_BATCHES:
            rows[name, micro_batch] = {}
            for stages in STAGES:
                found = shares(flags, options, stages, micro_batch)
                if found is not None:
                    rows[name, micro_batch][stages] = found
                    pairs = ", ".join(f"{stock:.1%} {overlap:.1%}" for stock, overlap in found)
                    print(f"{name:10}{micro_batch:12}{stages:8}  {pairs}", flush=True)
    draw(rows, options)
    print(options.output)


if __name__ == "__main__":
    main()
