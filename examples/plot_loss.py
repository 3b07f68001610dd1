"""Draws training and validation loss of one or several runs from Megatron's TensorBoard logs.

    python examples/plot_loss.py mHC=runs/gpt-mhc ordinary=runs/gpt-ordinary \\
        --entropy-from runs/data/stdlib.json --output loss.png

Each run is `LABEL=FOLDER` or `FOLDER`; the event files may lie anywhere below the folder, also
those of several processes that resumed one another.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mhc.tools.plot_runs import LOSS_TAG, curves, labelled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VALIDATION_TAG = f"{LOSS_TAG} validation"
# From wide to narrow, so that curves which coincide all stay visible.
VALIDATION_STYLES: list[dict[str, Any]] = [
    {"linewidth": 4, "marker": "o", "markersize": 9},
    {"linewidth": 2, "marker": "s", "markersize": 5, "linestyle": "--"},
    {"linewidth": 1, "marker": "^", "markersize": 3, "linestyle": ":"},
]


def draw(runs: dict[str, Path], entropy: float | None = None) -> "Figure":
    """Draws all runs in one figure: a run is a colour, its validation loss the marked line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (label, folder) in enumerate(runs.items()):
        train, validation = curves(folder, LOSS_TAG, VALIDATION_TAG).values()
        if not train.steps:
            raise SystemExit(
                f"plot_loss: no {LOSS_TAG!r} in TensorBoard event files below {folder}; train with"
                " --tensorboard-dir, below this folder, or give another one"
            )
        colour = f"C{number}"
        axes.plot(*train, color=colour, alpha=0.4, linewidth=0.8, label=f"{label}, training")
        if validation.steps:
            name = f"{label}, validation (last {validation.values[-1]:.3f})"
            axes.plot(*validation, color=colour, label=name, **VALIDATION_STYLES[number % 3])
    if entropy is not None:
        name = f"unigram entropy of the data ({entropy:.3f})"
        axes.axhline(entropy, color="black", linestyle="--", linewidth=1, label=name)
    axes.set_xlabel("iteration (optimizer steps)")
    axes.set_ylabel("loss (nats a byte)")
    axes.set_title("Byte-level model on Python sources")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def named_run(text: str) -> tuple[str, Path]:
    """`LABEL=FOLDER` or `FOLDER` as a label and a folder."""
    try:
        return labelled(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    """Reads the command line and writes the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=named_run, metavar="[LABEL=]FOLDER")
    parser.add_argument("--output", type=Path, required=True, help="the PNG to write")
    parser.add_argument(
        "--entropy-from", type=Path, help="the JSON that prepare_data.py wrote; draws its entropy"
    )
    args = parser.parse_args()
    entropy = None
    if args.entropy_from:
        if not args.entropy_from.is_file():
            parser.error(f"--entropy-from {args.entropy_from} is not a file")
        entropy = json.loads(args.entropy_from.read_text())["unigram_entropy_nats"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(dict(args.runs), entropy).savefig(args.output, dpi=150)
    print(f"plot_loss: wrote {args.output}")


if __name__ == "__main__":
    main()
