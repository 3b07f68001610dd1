"""Draws sites beside peers, from what `sites.py` saved; no GPU needed.

    python benchmarks/kernels/sites_plot.py kernels.json --output kernels.png

A group of bars a size, a pane a direction, in passes of T*C bf16 elements from zero on. What is
more than three times as long as ours is cut off, with its value above it.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import command_line, plotting

FLOORS = {"forward": 14, "both": 34}
"""Passes of the fewest bytes of any known algorithm at n = 4. Both ways: 5 to read y and du for the
coefficients' gradients, 15 to read dy, x, du and f and write dx and df, with y made again."""
TITLES = {"forward": "forward", "both": "forward and backward"}
OURS = "ours"
CUT = 3.2
"""Times the longest of ours: where the axis ends."""


def plot(rows: list[dict[str, Any]], machine: str, path: Path) -> None:
    """Bars of passes, forward and both ways, a group of bars for each size.

    Args:
        rows: of `sites.compare`.
        machine: the card's name, for the title.
        path: of the picture.
    """
    done = [row for row in rows if "both_passes" in row]
    sizes = list(dict.fromkeys((row["tokens"], row["width"]) for row in done))
    names = list(dict.fromkeys(row["name"] for row in done))
    width = 0.84 / len(names)
    figure, panes = plotting.pyplot().subplots(
        2, 1, figsize=(3 + 1.1 * len(sizes), 7), sharex=True, layout="constrained"
    )
    for pane, (part, floor) in zip(panes, FLOORS.items(), strict=True):
        key = f"{part}_passes"
        longest = CUT * max((row[key] for row in done if row["name"] == OURS), default=floor)
        top = min(longest, max(row[key] for row in done))
        for k, name in enumerate(names):
            at = {(row["tokens"], row["width"]): row[key] for row in done if row["name"] == name}
            places = [i + (k - len(names) / 2) * width for i in range(len(sizes))]
            heights = [at.get(size, 0.0) for size in sizes]
            pane.bar(places, [min(h, top) for h in heights], width, label=name, align="edge")
            for place, height in zip(places, heights, strict=True):
                if height:
                    above = f"{height:.0f}" + " ↑" * (height > top)
                    y = min(height, top)
                    pane.text(place + width / 2, y, above, ha="center", va="bottom", fontsize=6)
        pane.axhline(floor, color="black", linewidth=0.8, linestyle="--")
        pane.text(len(sizes) - 0.5, floor, f" floor\n {floor}", ha="left", va="center", fontsize=8)
        pane.set_ylim(0, 1.1 * top)
        pane.set_xlim(-0.6, len(sizes) - 0.5)
        pane.set_title(TITLES[part], fontsize=10)
        pane.set_ylabel("passes of T*C bf16 elements")
    panes[0].legend(fontsize=8, ncols=2, loc="upper right")
    panes[1].set_xticks(range(len(sizes)), [f"T {tokens}\nC {wide}" for tokens, wide in sizes])
    figure.suptitle(f"A site of mHC, n = 4, on {machine}: time in passes over one stream")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read the file, draw."""
    parser = command_line.parser(__doc__)
    parser.add_argument("saved", type=Path, help="the JSON of sites.py")
    parser.add_argument("--output", type=Path, help="the picture (default: beside it)")
    options = parser.parse_args()
    report = json.loads(options.saved.read_text())
    output = options.output or options.saved.with_suffix(".png")
    plot(report["sites"], report["machine"], output)
    print(output)


if __name__ == "__main__":
    main()
