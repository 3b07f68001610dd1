"""What training runs left behind: Megatron's TensorBoard events and mHC's metrics file."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mhc.metrics import strict_json
from megatron_mhc.metrics.monitor import METRICS_FILE

LOSS_TAG, GRADIENT_TAG = "lm loss", "grad-norm"
"""What Megatron calls them in TensorBoard."""


class Curve(NamedTuple):
    """A value by training step."""

    steps: list[int]
    values: list[float]


@dataclass
class Run:
    """What a run left behind.

    Attributes:
        label: its name in the legends; color: matplotlib's name of its colour in every picture.
        loss: training loss, nats a token; gradient_norm: of all parameters, before clipping.
        logged: the lines of the metrics file, by step; empty for the ordinary model.
    """

    label: str
    color: str
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


def largest(values: list[float]) -> float:
    """The largest value; NaN where one of them is (`max` goes by their order)."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def curves(folder: Path, *tags: str) -> dict[str, Curve]:
    """What was logged under these TensorBoard tags in all event files below a folder.

    Where runs overlap the later event counts; the curve of a tag that nobody logged is empty.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, tuple[float, float]]] = {tag: {} for tag in tags}
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


def labelled(text: str) -> tuple[str, Path]:
    """`LABEL=FOLDER` or `FOLDER` as a label and a folder; the folder's own name may have a `=`.

    Raises:
        ValueError: there is no such folder.
    """
    whole = Path(text)
    if whole.is_dir():
        return whole.resolve().name, whole
    label, separator, path = text.partition("=")
    folder = Path(path if separator else text)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a run's, FOLDER or LABEL=FOLDER")
    return label, folder


def read_run(text: str, color: str = "C0") -> Run:
    """Read `FOLDER` or `LABEL=FOLDER`; the files may lie anywhere below the folder.

    Raises:
        SystemExit: the folder is not there, holds no training loss, or a metrics file is broken.
    """
    try:
        label, folder = labelled(text)
    except ValueError as error:
        raise SystemExit(f"plot: {error}") from error
    read = curves(folder, LOSS_TAG, GRADIENT_TAG)
    if not read[LOSS_TAG].steps:
        raise SystemExit(
            f"plot: no {LOSS_TAG!r} in TensorBoard event files below {folder}; train with"
            " --tensorboard-dir, below this folder, or give another one"
        )
    by_step = {}
    for file in sorted(folder.rglob(METRICS_FILE), key=lambda f: f.stat().st_mtime):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                metrics = strict_json.read(line)
                by_step[metrics["step"]] = metrics
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                raise SystemExit(
                    f"plot: {file}, line {number} is no line of mHC's metrics"
                    f" ({type(error).__name__}: {error}): a run that was killed cuts its last line"
                    " off; remove it"
                ) from error
    return Run(
        label,
        color,
        read[LOSS_TAG],
        read[GRADIENT_TAG],
        [by_step[step] for step in sorted(by_step)],
    )
