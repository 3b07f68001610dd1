"""Draws the pictures of README.md and docs/ from what the reports hold.

    python docs/tools/draw_pictures.py [--sites benchmarks/results/DATE-NAME.json]

`site-and-gain.png`: a site beside its peers, from the newest report of
`benchmarks/kernels/sites.py`, and the composite gain, from the tables of
`examples/stability/README.md`.
`recompute-blocks.png`: memory over the length of a block, by `megatron_mhc.costs.recompute_plan`.
`schedule.png`: the order of a stage's work with one and two microbatches in flight, by
`megatron_mhc.costs.schedule_model`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.common.plotting import pyplot  # noqa: E402
from benchmarks.kernels.sites_plot import SINGLE_PASS  # noqa: E402
from megatron_mhc.costs import schedule_model  # noqa: E402
from megatron_mhc.costs.recompute_plan import Plan  # noqa: E402

IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results"
STABILITY = ROOT / "examples" / "stability" / "README.md"
OURS, HC = "#1f77b4", "#ff7f0e"
TOKENS = 8192
LABEL: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8}


def newest_sites() -> Path:
    """The newest report of sites that holds the size which is drawn."""
    for path in sorted(RESULTS.glob("*.json"), reverse=True):
        rows = json.loads(path.read_text()).get("sites", [])
        if len({row["width"] for row in rows if row["tokens"] == TOKENS}) > 1:
            return path
    raise SystemExit(f"{RESULTS}: no report has sites of several widths at T {TOKENS}")


def site_times(report: dict[str, Any]) -> dict[str, dict[int, float]]:
    """us both ways by name and width at T 8192, n 4, bf16; of Transformer Engine's modes the better
    one, and no single pass, which computes another function."""
    times: dict[str, dict[int, float]] = {}
    for row in report["sites"]:
        case = row["tokens"], row.get("streams", 4), row.get("dtype", "bf16")
        if case == (TOKENS, 4, "bf16") and row["name"] != SINGLE_PASS and "both_us" in row:
            of = times.setdefault(row["name"].partition(",")[0], {})
            of[row["width"]] = min(row["both_us"], of.get(row["width"], float("inf")))
    return times


def gains() -> dict[str, dict[float, list[float]]]:
    """The last composite gain backward by model and peak rate, a value a seed (size single_gpu)."""
    text = STABILITY.read_text().partition("## single_gpu")[2].partition("\n## ")[0]
    head = next(line for line in text.splitlines() if line.startswith("| model"))
    column = [cell.strip() for cell in head.split("|")].index("gain backward: last, largest")
    found: dict[str, dict[float, list[float]]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > column and cells[1] in ("hc", "mhc"):
            last = float(cells[column].partition(",")[0])
            found.setdefault(cells[1], {}).setdefault(float(cells[2]), []).append(last)
    return found


def draw_site(pane: Any, report: dict[str, Any]) -> None:
    """Bars of a site's time, a group a width."""
    times = site_times(report)
    widths = sorted(times["ours"])
    bar = 0.8 / len(times)
    for k, (name, of) in enumerate(times.items()):
        colour = OURS if name == "ours" else ("#bdbdbd", "#8c8c8c", "#5f5f5f")[k % 3]
        places = [i + k * bar for i in range(len(widths))]
        label = "megatron_mhc" if name == "ours" else name
        pane.bar(places, [of[w] for w in widths], bar, color=colour, label=label, align="edge")
        for place, width in zip(places, widths, strict=True):
            pane.text(
                place + bar / 2, of[width], f"{of[width]:.0f}", ha="center", va="bottom", fontsize=8
            )
    pane.set_xticks([i + 0.4 for i in range(len(widths))], [f"C {width}" for width in widths])
    pane.set_ylabel("microseconds")
    card = report["machine"].replace("NVIDIA ", "").split()[0]
    pane.set_title(f"A site, forward and backward\nT {TOKENS}, n 4, bf16, one {card}", fontsize=11)
    pane.legend(frameon=False, fontsize=9)


def draw_gain(pane: Any) -> None:
    """The composite gain over the peak rate, a point a seed."""
    found = gains()
    for model, colour, label in (("hc", HC, "HC"), ("mhc", OURS, "mHC")):
        of = found[model]
        rates = sorted(of)
        lowest = [min(of[rate]) for rate in rates]
        pane.plot(rates, lowest, color=colour, linewidth=1)
        for rate in rates:
            pane.scatter([rate] * len(of[rate]), of[rate], color=colour, s=22, label=label)
            label = "_"
    pane.axhline(1, color="black", linewidth=0.8, linestyle=":")
    pane.set_xscale("log")
    pane.set_yscale("log")
    pane.set_xticks([3e-3, 1e-2, 3e-2, 1e-1], ["0.003", "0.01", "0.03", "0.1"])
    pane.minorticks_off()
    pane.set_xlabel("peak learning rate")
    pane.set_ylabel("factor")
    pane.set_title(
        "Composite gain of 96 sites after 200 steps\n"
        "backward; a point a seed, the line joins the lower",
        size=11,
    )
    pane.legend(frameon=False, fontsize=9, loc="center right")


def site_and_gain(sites: Path) -> Path:
    """The README's picture."""
    report = json.loads(sites.read_text())
    figure, panes = pyplot().subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    draw_site(panes[0], report)
    draw_gain(panes[1])
    for pane in panes:
        pane.spines[["top", "right"]].set_visible(False)
    path = IMAGES / "site-and-gain.png"
    figure.savefig(path, dpi=120)
    return path


def recompute_blocks() -> Path:
    """Memory that mHC adds over the length of a block, 32 layers, for several in flight."""
    layers = 32
    figure, pane = pyplot().subplots(figsize=(7, 3.8), layout="constrained")
    lengths = range(1, layers + 1)
    for in_flight, colour in ((1, OURS), (4, HC), (8, "#2ca02c")):
        plans = [Plan(4, 4096, (layers,), in_flight, 0, length) for length in lengths]
        least = Plan(4, 4096, (layers,), in_flight, 0, "auto").layers
        of = [(plan.kept(plan.layers) + plan.rebuilt(plan.layers)) * 8192 / 1024 for plan in plans]
        pane.plot(lengths, of, color=colour, label=f"{in_flight} in flight: auto takes {least}")
        pane.scatter([least], [of[least - 1]], color=colour)
    pane.set_xscale("log", base=2)
    pane.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    pane.set_ylim(0)
    pane.set_xlabel("layers a block (--mhc-recompute)")
    pane.set_ylabel("KiB a token")
    pane.set_title(
        "Block starts that are kept and one block rebuilt\n32 layers, C 4096, n 4, bf16",
        fontsize=11,
    )
    pane.legend(frameon=False, fontsize=9)
    pane.spines[["top", "right"]].set_visible(False)
    path = IMAGES / "recompute-blocks.png"
    figure.savefig(path, dpi=120)
    return path


def draw_schedule(pane: Any, ahead: int, stages: int, microbatches: int, message: float) -> None:
    """Forwards (1 long) and backwards (2 long) of each stage, messages of a length between."""
    done: dict[tuple[bool, int, int], float] = {}
    order = {s: schedule_model.order(s, stages, microbatches, ahead=ahead) for s in range(stages)}
    free = dict.fromkeys(range(stages), 0.0)
    while any(order.values()):
        for stage, queue in order.items():
            if not queue:
                continue
            forward, _, microbatch = queue[0]
            before = stage - 1 if forward else stage + 1
            arrived = 0.0
            if 0 <= before < stages:
                if (forward, before, microbatch) not in done:
                    continue
                arrived = done[forward, before, microbatch] + message
            start = max(free[stage], arrived)
            long = 1.0 if forward else 2.0
            free[stage] = done[forward, stage, microbatch] = start + long
            queue.pop(0)
            colour = "#9ecae1" if forward else "#fdae6b"
            pane.barh(stage, long, left=start, color=colour, edgecolor="white", height=0.85)
            pane.text(start + long / 2, stage, microbatch + 1, ha="center", va="center", fontsize=8)
    pane.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)])
    pane.invert_yaxis()
    pane.spines[["top", "right"]].set_visible(False)


def schedule() -> Path:
    """Overlap with one in flight and with two."""
    figure, panes = pyplot().subplots(2, 1, figsize=(10, 4.4), sharex=True, layout="constrained")
    for pane, ahead in zip(panes, (1, 2), strict=True):
        draw_schedule(pane, ahead, stages=3, microbatches=8, message=0.4)
        pane.set_title(f"--mhc-overlap-in-flight {ahead}", fontsize=10, loc="left")
    panes[1].set_xlabel("time; a forward takes 1, a backward 2, a message between two stages 0.4")
    path = IMAGES / "schedule.png"
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=Path, help="what sites.py saved (default: the newest)")
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    for path in (site_and_gain(options.sites or newest_sites()), recompute_blocks(), schedule()):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
