"""The pictures of the evidence: a function each, from a study to a figure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .results import Result, Study
from .statistics import Points, band

COLORS = {"ordinary": "black", "hc": "C1", "mhc": "C0", "mhc_zero": "C2"}
NAMES = {
    "ordinary": "ordinary residuals",
    "hc": "HC (unconstrained)",
    "mhc": "mHC (init residual)",
    "mhc_zero": "mHC (init zero)",
}
TOKENS = "training tokens (millions)"
SITES = 8
"""Sites of a heat map, evenly over depth."""
MILLION = 1e6
ADAM_EPS = 1e-8


def _axes(title: str, x: str, y: str, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8 if columns == 1 else 4.6 * columns, 4.8), layout="constrained")
    grid = figure.subplots(1, columns, squeeze=False)[0]
    figure.suptitle(title, fontsize=12)
    for axes in grid:
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
    return figure, grid if columns > 1 else grid[0]


def _late(axes: Any, curves: list[Points]) -> None:
    """Show the last three fifths of losses: the first fall hides what differs."""
    late = [y for points in curves for x, y in points if x >= 0.4 * points[-1][0]]
    if late:
        edge = 0.05 * (max(late) - min(late)) or 0.1
        axes.set_ylim(min(late) - edge, max(late) + edge)


def _lines(study: Study) -> list[tuple[str, str]]:
    """The plans of whole runs, and the models of each."""
    return [(plan, model) for plan in ("main", "longer") for model in study.models(plan)]


def _banded(axes: Any, study: Study, curve: Callable[[Result], Points], scale: float) -> None:
    """A line a model: the mean over seeds, in a shade from lowest to highest; dashed: longer."""
    drawn = []
    for plan, model in _lines(study):
        runs = study.whole(plan, model)
        rows = band([curve(run) for run in runs])
        if not rows:
            continue
        xs = [row[0] / scale for row in rows]
        name = f"{NAMES[model]}: {rows[-1][1]:.3f}, {len(runs)} seed{'s' * (len(runs) > 1)}"
        style = {"color": COLORS[model], "lw": 1.6, "ls": "-" if plan == "main" else "--"}
        axes.plot(xs, [row[1] for row in rows], **style, label=name)
        low, high = ([row[i] for row in rows] for i in (2, 3))
        axes.fill_between(xs, low, high, color=COLORS[model], alpha=0.2, lw=0)
        drawn.append([(x, y) for x, y, *_ in rows])
    _late(axes, drawn)
    axes.legend()


def over_tokens(study: Study) -> Figure:
    """Validation loss over tokens."""
    figure, axes = _axes(
        "Held-out loss over training tokens (shade: lowest to highest seed)",
        TOKENS,
        "validation loss (nats a token)",
    )
    _banded(axes, study, lambda result: result.validation, MILLION)
    return figure


def over_time(study: Study) -> Figure:
    """Validation loss over the time of training, a line a run; dashed: longer ones."""
    figure, axes = _axes(
        "Held-out loss over training time on one GPU (steps times the time of one)",
        "minutes of training, without start-up and validation",
        "validation loss (nats a token)",
    )
    drawn = []
    for plan, model in _lines(study):
        style = {"color": COLORS[model], "lw": 1.2, "ls": "-" if plan == "main" else "--"}
        for number, run in enumerate(study.whole(plan, model)):
            points = run.over_time
            xs, ys = [x / 60 for x, _ in points], [y for _, y in points]
            name = f"{NAMES[model]}: {1000 * (run.step_time or 0):.0f} ms a step"
            axes.plot(xs, ys, **style, label=None if number else name)
            drawn.append(points)
    _late(axes, drawn)
    axes.legend()
    return figure


def streams(study: Study) -> Figure:
    """Composite gain, distance of H_res from the identity, use of streams."""
    figure, grid = _axes("What the streams do over training", TOKENS, "", 4)
    panels = (
        ("Amax gain of the product of all H_res, backward", "backward", "log"),
        ("distance of H_res from the identity", "away", "linear"),
        ("streams a site reads from (of n)", "read", "linear"),
        ("1 - cosine between streams (0: all the same)", "apart", "linear"),
    )
    for axes, (title, name, scale) in zip(grid, panels, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_yscale(scale)
        for run in study.of("main"):
            points = run.logged_over_tokens(name)
            if points:
                label = NAMES[run.model] if run is study.of("main", run.model)[0] else None
                xs = [x / MILLION for x, _ in points]
                axes.plot(xs, [y for _, y in points], color=COLORS[run.model], label=label)
        axes.legend()
    return figure


def rates(study: Study) -> Figure:
    """Last loss over the learning rate; a cross at the top: it broke."""
    figure, axes = _axes(
        "Held-out loss after the sweep's short runs (crosses: the run broke)",
        "peak learning rate",
        "last validation loss (nats a token)",
    )
    for number, model in enumerate(m for m in study.models("sweep") if m in COLORS):
        whole = [(r.rate, r.loss) for r in study.of("sweep", model) if r.is_whole]
        style = {"color": COLORS[model], "marker": "o"}
        axes.plot([x for x, _ in whole], [y for _, y in whole], **style, label=NAMES[model])
        broke = [r.rate for r in study.of("sweep", model) if r.outcome.startswith("broke")]
        heights = [0.97 - 0.03 * number] * len(broke)
        axes.plot(
            broke, heights, "x", color=COLORS[model], transform=axes.get_xaxis_transform(), ms=9
        )
    axes.set_xscale("log")
    tried = sorted({r.rate for r in study.of("sweep")})
    axes.set_xticks(tried, [f"{rate:g}" for rate in tried])
    axes.minorticks_off()
    axes.legend()
    return figure


def adam(study: Study) -> Figure:
    """The root of Adam's second moment for each group of mHC's parameters, beside eps."""
    figure, axes = _axes(
        "What Adam divides by, mHC's parameters (below eps, steps shrink)",
        TOKENS,
        "root of the second moment (root mean square over sites)",
    )
    run = study.of("main", "mhc")[0]
    a_step = run.kept["tokens_per_step"]
    lines = run.kept["updates"]
    styles = {"pre": ":", "post": "--", "res": "-"}
    colors = {"phi": "C0", "bias": "C3", "alpha": "C2"}
    for group in lines[-1]["groups"]:
        kind, which = group.split("_")
        xs = [line["step"] * a_step / MILLION for line in lines]
        ys = [line["groups"][group][1] for line in lines]
        name = f"{'b' if kind == 'bias' else kind} {which}"
        axes.plot(xs, ys, color=colors[kind], linestyle=styles[which], label=name)
    axes.axhline(ADAM_EPS, color="black", lw=1, label="Adam's eps")
    axes.set_yscale("log")
    axes.legend(ncols=2)
    return figure


def heat_maps(run: Result) -> Figure:
    """H_res over its range from 0 to 1, and below it H_res - I on a scale of its own."""
    last = run.kept["last"]
    count = len(last["sites"])
    shown = sorted({round(i * (count - 1) / (SITES - 1)) for i in range(SITES)})
    matrices = [last["h_res"][i] for i in shown]
    away = [
        [[value - (i == j) for j, value in enumerate(row)] for i, row in enumerate(matrix)]
        for matrix in matrices
    ]
    size = max(abs(value) for matrix in away for row in matrix for value in row) or 1.0
    figure = Figure(figsize=(1.5 * len(shown) + 1.6, 4.4), layout="constrained")
    grid = figure.subplots(2, len(shown), squeeze=False)
    whole = {"cmap": "viridis", "vmin": 0, "vmax": 1}
    own = {"cmap": "RdBu_r", "vmin": -size, "vmax": size}
    for row, (values, limits, name) in enumerate(
        ((matrices, whole, "H_res"), (away, own, "H_res - identity"))
    ):
        for axes, matrix, i in zip(grid[row], values, shown, strict=True):
            image = axes.imshow(matrix, **limits)
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                site = last["sites"][i]
                axes.set_title(f"layer {site // 2 + 1}\n{'MLP' if site % 2 else 'attention'}")
        grid[row][0].set_ylabel(f"{name}\ninto stream")
        figure.colorbar(image, ax=list(grid[row]), shrink=0.9)
    figure.supxlabel("from stream (mean over tokens)", fontsize=9)
    figure.suptitle(f"{NAMES.get(run.model, run.model)}, rate {run.rate:g}, step {last['step']}")
    return figure


def draw(study: Study, folder: Path) -> list[Path]:
    """Write every picture that there are runs for; returns the files."""
    figures = {}
    if study.of("sweep"):
        figures["rates"] = rates(study)
    if study.of("main"):
        figures["over_tokens"], figures["over_time"] = over_tokens(study), over_time(study)
        figures["streams"] = streams(study)
    if any(run.kept["updates"] for run in study.of("main", "mhc")[:1]):
        figures["adam"] = adam(study)
    for model in ("mhc", "mhc_zero", "mhc_fast"):
        for run in [
            r for r in (*study.of("main", model), *study.of("ablations", model)) if r.logged
        ][:1]:
            figures[f"h_res_{model}"] = heat_maps(run)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
    return [folder / f"{name}.png" for name in figures]
