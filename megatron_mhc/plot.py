"""`python -m megatron_mhc plot`: pictures of one or several runs, and a page that shows them."""

import base64
import html
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .monitor import METRICS_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS_TAG, GRADIENT_TAG = "lm loss", "grad-norm"
"""What Megatron calls them in TensorBoard."""
HEAT_MAPS = 32
"""At most so many sites are drawn, evenly over the depth."""
DASHED = (0, (4, 2))


class Curve(NamedTuple):
    """A value by training step."""

    steps: list[int]
    values: list[float]


@dataclass
class Run:
    """What a run left behind.

    Attributes:
        label: its name in the legends.
        loss: training loss, nats a token; gradient_norm: of all parameters, before clipping.
        logged: the lines of the metrics file, by step; empty for the ordinary model.
    """

    label: str
    loss: Curve
    gradient_norm: Curve
    logged: list[dict[str, Any]] = field(default_factory=list)

    def over_steps(self, name: str) -> Curve:
        """A number of every logged step: `gradient_norm`, or a composite gain by its name."""
        steps = [line["step"] for line in self.logged]
        if name == "gradient_norm":
            return Curve(steps, [line[name] for line in self.logged])
        end = -1 if "forward" in name else 0
        return Curve(steps, [line["site"][f"depth_{name}"][end] for line in self.logged])


class Picture(NamedTuple):
    """A figure, the name of its PNG, and the line that explains it."""

    name: str
    figure: "Figure"
    explanation: str


def _curves(folder: Path) -> dict[str, Curve]:
    """The scalars of all event files below a folder; where runs overlap the later event counts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, tuple[float, float]]] = {LOSS_TAG: {}, GRADIENT_TAG: {}}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        log = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in set(found) & set(log.Tags()["scalars"]):
            for event in log.Scalars(tag):
                value = (event.wall_time, event.value)
                found[tag][event.step] = max(found[tag].get(event.step, value), value)
    return {
        tag: Curve(sorted(by_step), [by_step[step][1] for step in sorted(by_step)])
        for tag, by_step in found.items()
    }


def read_run(text: str) -> Run:
    """Read `FOLDER` or `LABEL=FOLDER`; the files may lie anywhere below the folder.

    Raises:
        SystemExit: the folder is not there, holds no training loss, or a metrics file is broken.
    """
    label, separator, path = text.partition("=")
    folder = Path(path if separator else text)
    if not folder.is_dir():
        raise SystemExit(f"plot: {folder} is not a folder")
    curves = _curves(folder)
    if not curves[LOSS_TAG].steps:
        raise SystemExit(
            f"plot: no {LOSS_TAG!r} in TensorBoard event files below {folder}; train with"
            " --tensorboard-dir"
        )
    by_step = {}
    for file in sorted(folder.rglob(METRICS_FILE), key=lambda f: f.stat().st_mtime):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                metrics = json.loads(line)
                by_step[metrics["step"]] = metrics
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                raise SystemExit(f"plot: {file}, line {number}: {error!r}") from error
    return Run(
        label if separator else folder.resolve().name,
        curves[LOSS_TAG],
        curves[GRADIENT_TAG],
        [by_step[step] for step in sorted(by_step)],
    )


def _figure(title: str, x: str, y: str) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _marker(points: list[int]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(points) < 40 else {}


STEP_AXIS = "training step (optimizer updates)"


def _loss(runs: list[Run]) -> Picture:
    figure, axes = _figure("Training loss", STEP_AXIS, "loss (nats a token)")
    for number, run in enumerate(runs):
        name = f"{run.label} (last {run.loss.values[-1]:.3f})"
        axes.plot(*run.loss, color=f"C{number}", lw=1.2, label=name, **_marker(run.loss.steps))
    axes.legend()
    return Picture("loss", figure, "Training loss of every run, as Megatron logged it.")


def _gradient_norm(runs: list[Run]) -> Picture:
    figure, axes = _figure("Gradient norm", STEP_AXIS, "L2 norm before clipping (log scale)")
    for number, run in enumerate(runs):
        style: dict[str, Any] = {"color": f"C{number}", "lw": 1.2}
        if run.gradient_norm.steps:
            marker = _marker(run.gradient_norm.steps)
            axes.plot(*run.gradient_norm, **style, **marker, label=f"{run.label}, all parameters")
        if run.logged:
            ours = run.over_steps("gradient_norm")
            name = f"{run.label}, parameters of the hyper-connections"
            axes.plot(*ours, **style, linestyle=DASHED, **_marker(ours.steps), label=name)
    axes.set_yscale("log")
    axes.legend()
    return Picture(
        "gradient_norm",
        figure,
        "L2 norm of the gradient before clipping: of the whole model, and (dashed) of the"
        " parameters of the hyper-connections alone. Spikes that grow announce a run that breaks.",
    )


def _gain_axis(axes: Any, largest: float) -> None:
    """A log scale where gains span a factor, else a linear one around 1."""
    axes.axhline(1, color="black", lw=0.8, linestyle=":", label="1: nothing grows")
    if largest > 3:
        axes.set_yscale("log")
    elif largest < 1.05:
        axes.set_ylim(0.95, 1.05)
    axes.ticklabel_format(axis="y", useOffset=False) if largest <= 3 else None
    axes.legend()


def _gain_over_steps(runs: list[Run]) -> Picture:
    figure, axes = _figure(
        "Composite gain of H_res over the whole depth", STEP_AXIS, "Amax gain (factor)"
    )
    largest = 1.0
    for number, run in enumerate(runs):
        for direction, linestyle in (("forward", "-"), ("backward", DASHED)):
            mean = run.over_steps(f"gain_{direction}_mean")
            peak = run.over_steps(f"gain_{direction}_max").values
            name = f"{run.label}, {direction} (last {mean.values[-1]:.4g})"
            marker = _marker(mean.steps)
            axes.plot(*mean, color=f"C{number}", linestyle=linestyle, label=name, **marker)
            axes.fill_between(*mean, peak, color=f"C{number}", alpha=0.12, lw=0)
            largest = max(largest, *peak)
    _gain_axis(axes, largest)
    return Picture(
        "gain_over_steps",
        figure,
        "How much the product of all H_res can amplify: the largest absolute row sum (forward, a"
        " signal) and column sum (backward, a gradient). Lines are means over tokens, the shade"
        " reaches up to the largest token. Doubly stochastic matrices stay near 1.",
    )


def _gain_over_depth(runs: list[Run]) -> Picture:
    figure, axes = _figure(
        "Composite gain of H_res over depth, at the last logged step",
        "site (two a layer: attention, MLP), from the entry",
        "Amax gain (factor)",
    )
    largest = 1.0
    for number, run in enumerate(runs):
        line = run.logged[-1]
        for direction, linestyle in (("forward", "-"), ("backward", DASHED)):
            values = line["site"][f"depth_gain_{direction}_mean"]
            name = f"{run.label}, {direction}, step {line['step']}"
            axes.plot(
                line["sites"],
                values,
                color=f"C{number}",
                linestyle=linestyle,
                label=name,
                **_marker(values),
            )
            largest = max(largest, *values)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _gain_axis(axes, largest)
    return Picture(
        "gain_over_depth",
        figure,
        "Forward: the product of H_res from the entry up to a site. Backward: from a site to the"
        " exit, which a gradient passes in reverse. Means over tokens.",
    )


def _heat_maps(run: Run) -> Picture:
    from matplotlib.figure import Figure

    line = run.logged[-1]
    count = len(line["sites"])
    shown = sorted({round(i * (count - 1) / (HEAT_MAPS - 1)) for i in range(HEAT_MAPS)})
    shown = list(range(count)) if count <= HEAT_MAPS else shown
    columns = min(8, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.3 + 1.35 * max(columns, 4), 1.3 + 1.65 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    size = max(abs(value) for i in shown for row in line["h_res"][i] for value in row)
    limits: dict[str, Any] = {"vmin": 0, "vmax": 1, "cmap": "viridis"}
    if run.logged[-1]["variant"] == "hc":
        limits = {"vmin": -size, "vmax": size, "cmap": "RdBu_r"}
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for axes, i in zip(grid, shown, strict=False):
        image = axes.imshow(line["h_res"][i], **limits)
        site = line["sites"][i]
        kind = "MLP" if site % 2 else "attention"
        axes.set_title(f"layer {site // 2 + 1}\n{kind}", fontsize=8)
        axes.set_xticks(range(line["num_streams"]))
        axes.set_yticks(range(line["num_streams"]))
        axes.tick_params(labelsize=6)
    figure.colorbar(image, ax=list(grid), label="weight (mean over tokens)", shrink=0.9)
    figure.supxlabel("from stream (src)", fontsize=9)
    figure.supylabel("into stream (dst)", fontsize=9)
    figure.suptitle(f"H_res by layer: {run.label}, step {line['step']}", fontsize=11)
    name = re.sub(r"[^A-Za-z0-9]+", "_", run.label).strip("_") or "run"
    part = "" if len(shown) == count else f" {len(shown)} of {count} sites are shown."
    return Picture(
        f"h_res_{name}",
        figure,
        f"H_res of {run.label} by layer, mean over tokens: row i says what stream i is made of."
        f" Bright on the diagonal alone: streams do not mix; even: they are averaged.{part}",
    )


def pictures(runs: list[Run]) -> list[Picture]:
    """Every picture that these runs have the numbers for."""
    with_metrics = [run for run in runs if run.logged]
    drawn = [_loss(runs)]
    if with_metrics or any(run.gradient_norm.steps for run in runs):
        drawn.append(_gradient_norm(runs))
    if with_metrics:
        drawn += [_gain_over_steps(with_metrics), _gain_over_depth(with_metrics)]
        drawn += [_heat_maps(run) for run in with_metrics]
    return drawn


def _table(runs: list[Run]) -> str:
    """The last numbers of every run, as rows of an HTML table."""
    rows = []
    for run in runs:
        cells = [run.label, f"{run.loss.steps[-1]}", f"{run.loss.values[-1]:.4f}"]
        if run.logged:
            for name in ("gain_forward_mean", "gain_forward_max", "gain_backward_mean"):
                cells.append(f"{run.over_steps(name).values[-1]:.4f}")
            errors = run.logged[-1]["site"]["row_error"]
            cells.append(f"{max(errors):.1e}" if run.logged[-1]["variant"] == "mhc" else "–")
        cells += ["–"] * (7 - len(cells))
        rows.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    return "\n".join(rows)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>mHC runs</title>
<link rel="icon" href="data:,">
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
figure {{ margin: 2em 0; }}
img {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ border-bottom: 1px solid #ccc; padding: 0.3em 0.8em; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
</style>
</head>
<body>
<h1>mHC runs</h1>
<p>The last logged values. Gains are Amax gains of the composite H_res over the whole depth.</p>
<table>
<tr><th>run</th><th>step</th><th>loss (nats a token)</th><th>gain forward, mean</th>
<th>gain forward, largest token</th><th>gain backward, mean</th><th>row error of H_res</th></tr>
{table}
</table>
{figures}
</body>
</html>
"""


def write_plots(texts: list[str], output: Path) -> list[Path]:
    """Read runs, write one PNG a picture and `index.html`, which holds them all.

    Args:
        texts: `FOLDER` or `LABEL=FOLDER`, one a run.
        output: a folder, made if it is not there.

    Returns:
        The files that were written, the page last.

    Raises:
        SystemExit: a package is missing, two runs have one label, or a run cannot be read.
    """
    try:
        import matplotlib  # noqa: F401
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"plot: {error.name} is not installed; pip install 'megatron_mhc[plot]' brings it"
        ) from error
    runs = [read_run(text) for text in texts]
    labels = [run.label for run in runs]
    if doubled := {label for label in labels if labels.count(label) > 1}:
        raise SystemExit(
            f"plot: several runs are called {', '.join(sorted(doubled))}: give them names,"
            " LABEL=FOLDER"
        )
    output.mkdir(parents=True, exist_ok=True)
    written, figures = [], []
    names: set[str] = set()
    for picture in pictures(runs):
        # labels that differ in punctuation alone share a file name
        name = picture.name
        while name in names:
            name += "_"
        names.add(name)
        file = output / f"{name}.png"
        picture.figure.savefig(file, dpi=120)
        written.append(file)
        encoded = base64.b64encode(file.read_bytes()).decode()
        text = html.escape(picture.explanation)
        figures.append(
            f'<figure><img alt="{html.escape(picture.name)}" src="data:image/png;base64,{encoded}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    page = output / "index.html"
    page.write_text(PAGE.format(table=_table(runs), figures="\n".join(figures)))
    return [*written, page]
