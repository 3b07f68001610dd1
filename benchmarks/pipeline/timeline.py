"""Draws what the GPUs of a pipeline do in a step, from traces of PyTorch's profiler.

    python benchmarks/pipeline/timeline.py --out step.png stock=TRACES/mhc overlap=TRACES/overlap

Each NAME=FOLDER is a panel; FOLDER holds a trace of every rank (`multi_gpu/rounds.py --trace`, or
Megatron's `--profile --use-pytorch-profiler`). A rank has three rows: the model's kernels, mHC's
kernels, and messages between stages. All panels share one scale of time.
"""

import importlib
import pkgutil
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import command_line, plotting
from benchmarks.common.spans import Span, is_message, kernels, together, union

ROWS = {"model": "#9aa5b1", "mHC": "#d1495b", "messages": "#2e86ab"}


def own_kernels() -> frozenset[str]:
    """Names of mHC's Triton kernels, as a profiler shows them."""
    from triton.runtime.jit import JITFunction

    from megatron_mhc.kernels import triton

    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(triton.__path__, f"{triton.__name__}.")
    ]
    return frozenset(
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    )


def rows_of(trace: Path, own: frozenset[str]) -> dict[str, list[Span]]:
    """The kernels of a rank's trace by row of the picture: spans in milliseconds."""
    rows: dict[str, list[Span]] = {row: [] for row in ROWS}
    for name, (begin, end) in kernels(trace):
        row = "messages" if is_message(name) else "mHC" if name in own else "model"
        rows[row].append((begin / 1e3, end / 1e3))
    return {row: union(spans) for row, spans in rows.items()}


def rank_of(trace: Path) -> int:
    """The rank in a trace's name."""
    return int(re.findall(r"\d+", trace.name)[0])


def print_panel(name: str, stages: list[dict[str, list[Span]]]) -> None:
    """A line a rank: milliseconds of the step, of each row, of messages alone, of nothing."""
    print(f"{name:20}{'ms':>10}{'model':>10}{'mHC':>10}{'messages':>10}{'alone':>10}{'idle':>10}")
    for rank, stage in enumerate(stages):
        everything = union([span for spans in stage.values() for span in spans])
        work = union(stage["model"] + stage["mHC"])
        whole = everything[-1][1] - everything[0][0]
        busy = [sum(end - begin for begin, end in spans) for spans in stage.values()]
        alone = busy[2] - together(stage["messages"], work)
        idle = whole - sum(end - begin for begin, end in everything)
        figures = (whole, *busy, alone, idle)
        print(f"  rank {rank:<13}" + "".join(f"{figure:10.1f}" for figure in figures))


def draw(panels: dict[str, list[dict[str, list[Span]]]], out: Path) -> None:
    """A panel a run, three rows a rank."""
    pyplot = plotting.pyplot()
    ranks = len(next(iter(panels.values())))
    figure, axes = pyplot.subplots(
        len(panels), sharex=True, squeeze=False, figsize=(14, 0.55 * ranks * len(panels) + 1.5)
    )
    for axis, (name, stages) in zip(axes[:, 0], panels.items(), strict=True):
        start = min(spans[0][0] for stage in stages for spans in stage.values() if spans)
        for rank, stage in enumerate(stages):
            for index, (row, colour) in enumerate(ROWS.items()):
                bars = [(begin - start, end - begin) for begin, end in stage[row]]
                axis.broken_barh(bars, (rank + 0.28 * index, 0.26), color=colour, linewidth=0)
        axis.set_yticks([rank + 0.4 for rank in range(ranks)], [f"rank {r}" for r in range(ranks)])
        axis.invert_yaxis()
        axis.set_title(name, loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("milliseconds")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in ROWS.values()]
    figure.legend(handles, ROWS, ncol=len(ROWS), loc="upper right", frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    """Read the traces, print what each rank did and draw it."""
    parser = command_line.parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="a panel each")
    parser.add_argument("--out", type=Path, default=Path("timeline.png"), help="the picture")
    options = parser.parse_args()
    own = own_kernels()
    panels = {}
    for run in options.runs:
        name, _, folder = run.partition("=")
        traces = sorted(Path(folder).rglob("*.json*"), key=rank_of)
        if not traces:
            parser.error(f"no trace (*.json*) below {folder!r}: give a folder that --trace wrote")
        panels[name] = [rows_of(trace, own) for trace in traces]
        print_panel(name, panels[name])
    draw(panels, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
