"""The pictures of `python -m megatron_mhc plot`: a function each, from runs to a figure."""

import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from .plot_runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAT_MAPS = 32
"""At most so many sites are drawn, evenly over the depth."""
DASHED = (0, (4, 2))


class Picture(NamedTuple):
    """A figure, the name of its PNG, and the line that explains it."""

    name: str
    figure: "Figure"
    explanation: str


def _figure(title: str, x: str, y: str) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    return figure, axes


def _marker(points: list[int]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(points) < 40 else {}


STEP_AXIS = "training step (optimizer updates)"


def running_mean(values: list[float], window: int) -> list[float]:
    """Means over the last `window` values, over fewer where there are no more."""
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in parts]


def _loss(runs: list[Run]) -> Picture:
    figure, axes = _figure("Training loss", STEP_AXIS, "loss (nats a token)")
    for run in runs:
        steps, values = run.loss
        window = max(1, len(values) // 20)
        mean = running_mean(values, window)
        name = f"{run.label} (last {mean[-1]:.3f})"
        axes.plot(steps, mean, color=run.color, lw=1.6, label=name, **_marker(steps))
        if window > 1:
            axes.plot(steps, values, color=run.color, lw=0.6, alpha=0.35)
    axes.legend()
    return Picture(
        "loss",
        figure,
        "Training loss of every run, as Megatron logged it (thin), and its running mean over a"
        " twentieth of the run (thick, and in the legend).",
    )


def _gradient_norm(runs: list[Run]) -> Picture:
    figure, axes = _figure("Gradient norm", STEP_AXIS, "L2 norm before clipping (log scale)")
    for run in runs:
        style: dict[str, Any] = {"color": run.color, "lw": 1.2}
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
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
        if largest < 1.05:
            axes.set_ylim(0.95, 1.05)
    axes.legend()


def _gain_over_steps(runs: list[Run]) -> Picture:
    figure, axes = _figure(
        "Composite gain of H_res over the whole depth", STEP_AXIS, "Amax gain (factor)"
    )
    largest = 1.0
    for run in runs:
        for direction, linestyle in (("forward", "-"), ("backward", DASHED)):
            mean = run.over_steps(f"gain_{direction}_mean")
            peak = run.over_steps(f"gain_{direction}_max").values
            name = f"{run.label}, {direction} (last {mean.values[-1]:.4g})"
            marker = _marker(mean.steps)
            axes.plot(*mean, color=run.color, linestyle=linestyle, label=name, **marker)
            axes.fill_between(*mean, peak, color=run.color, alpha=0.12, lw=0)
            largest = max(largest, *peak)
    _gain_axis(axes, largest)
    return Picture(
        "gain_over_steps",
        figure,
        "How much the product of all H_res amplifies: the largest absolute row sum (forward, a"
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
    for run in runs:
        line = run.logged[-1]
        for direction, linestyle in (("forward", "-"), ("backward", DASHED)):
            values = line["site"][f"depth_gain_{direction}_mean"]
            name = f"{run.label}, {direction}, step {line['step']}"
            axes.plot(
                line["sites"],
                values,
                color=run.color,
                linestyle=linestyle,
                label=name,
                **_marker(values),
            )
            largest = max(largest, *values)
    _gain_axis(axes, largest)
    return Picture(
        "gain_over_depth",
        figure,
        "Forward: the product of H_res from the entry up to a site. Backward: from a site to the"
        " exit, which a gradient passes in reverse. Means over tokens.",
    )


def _distance(runs: list[Run]) -> Picture:
    figure, axes = _figure(
        "How far H_res is from the identity", STEP_AXIS, "Frobenius norm of H_res - I"
    )
    for run in runs:
        steps = [line["step"] for line in run.logged]
        distances = [line["site"]["to_identity"] for line in run.logged]
        mean = [sum(line) / len(line) for line in distances]
        low, high = ([pick(line) for line in distances] for pick in (min, max))
        name = f"{run.label} (last {mean[-1]:.3g})"
        axes.plot(steps, mean, color=run.color, label=name, **_marker(steps))
        axes.fill_between(steps, low, high, color=run.color, alpha=0.12, lw=0)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.legend()
    return Picture(
        "distance_to_identity",
        figure,
        "Whether the streams mix at all: the distance of H_res to the identity, a mean over tokens."
        " Lines are means over sites, the shade spans all sites. Uniform H_res of 4 streams are"
        " 1.73 away. The axis is linear below 0.01.",
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
    values = [abs(value) for i in shown for row in line["h_res"][i] for value in row]
    size = max((value for value in values if math.isfinite(value)), default=1.0)
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
        drawn.append(_distance(with_metrics))
        drawn += [_heat_maps(run) for run in with_metrics]
    return drawn
