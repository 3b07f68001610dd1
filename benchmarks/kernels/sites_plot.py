"""Draws sites beside peers, from what `sites.py` saved; no GPU needed.

    python benchmarks/kernels/sites_plot.py kernels.json --output kernels.png

A group of bars a size, a pane a direction, in passes over one stream of T*C elements from zero on.
What is more than three times as long as ours is cut off, with its value above it.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import command_line, plotting

OURS, SINGLE_PASS = "ours", "ours, deepseek_v4_1"


def floors(n: int, name: str = OURS) -> dict[str, int]:
    """Passes of the fewest bytes of any known algorithm with n streams: 14 and 34 at n = 4.

    Args:
        n: streams.
        name: of the implementation: the single pass computes another function, in 10 and 25.

    Forward reads x and f, writes y, reads it for u, writes u. Backward reads y and du for the
    coefficients' gradients, then dy, x, du and f, and writes dx and df, with y made again.
    """
    if name == SINGLE_PASS:
        return {"forward": 2 * n + 2, "both": 5 * n + 5}
    return {"forward": 3 * n + 2, "both": 7 * n + 6}


TITLES = {"forward": "forward", "both": "forward and backward"}
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
    sizes = list(dict.fromkeys(map(_size, done)))
    names = list(dict.fromkeys(row["name"] for row in done))
    width = 0.84 / len(names)
    figure, panes = plotting.pyplot().subplots(
        2, 1, figsize=(3 + 1.1 * len(sizes), 7), sharex=True, layout="constrained"
    )
    for pane, part in zip(panes, TITLES, strict=True):
        key = f"{part}_passes"
        lines = [floors(n)[part] for _, _, n, _ in sizes]
        longest = CUT * max((row[key] for row in done if row["name"] == OURS), default=max(lines))
        top = min(longest, max(row[key] for row in done))
        for k, name in enumerate(names):
            at = {_size(row): row[key] for row in done if row["name"] == name}
            places = [i + (k - len(names) / 2) * width for i in range(len(sizes))]
            heights = [at.get(size, 0.0) for size in sizes]
            pane.bar(places, [min(h, top) for h in heights], width, label=name, align="edge")
            for place, height in zip(places, heights, strict=True):
                if height:
                    above = f"{height:.0f}" + " ↑" * (height > top)
                    y = min(height, top)
                    pane.text(place + width / 2, y, above, ha="center", va="bottom", fontsize=6)
        ends = [i - 0.5 for i in range(len(sizes))], [i + 0.5 for i in range(len(sizes))]
        pane.hlines(lines, *ends, color="black", linewidth=0.8, linestyle="--")
        label = f" floor\n {lines[-1]}"
        pane.text(len(sizes) - 0.5, lines[-1], label, ha="left", va="center", fontsize=8)
        pane.set_ylim(0, 1.1 * top)
        pane.set_xlim(-0.6, len(sizes) - 0.5)
        pane.set_title(TITLES[part], fontsize=10)
        pane.set_ylabel("passes over T*C elements")
    panes[0].legend(fontsize=8, ncols=2, loc="upper right")
    panes[1].set_xticks(range(len(sizes)), [_label(*size) for size in sizes])
    figure.suptitle(f"A site of mHC on {machine}: time in passes over one stream")
    figure.savefig(path, dpi=120)


def _size(row: dict[str, Any]) -> tuple[int, int, int, str]:
    """What two rows of the same bars have in common; older files have n = 4 and bf16 alone."""
    return row["tokens"], row["width"], row.get("streams", 4), row.get("dtype", "bf16")


def _label(tokens: int, width: int, n: int, dtype: str) -> str:
    return f"T {tokens}\nC {width}\nn {n}" + f", {dtype}" * (dtype != "bf16")


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
