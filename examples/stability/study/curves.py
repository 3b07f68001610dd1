"""The curves of a run, small enough to keep: read from what Megatron left, written as JSON."""

import contextlib
import importlib.metadata
import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

from megatron_mhc.metrics import strict_json
from megatron_mhc.metrics.monitor import METRICS_FILE
from megatron_mhc.tools.plot_runs import Curve, curves

from .runs import ROOT, UPDATES_FILE, Run

TAGS = {
    "loss": "lm loss",
    "gradient_norm": "grad-norm",
    "validation": "lm loss validation",
    "step_seconds": "iteration-time",
    "memory": "mem-max-allocated-bytes",
}
PARAMETERS = re.compile(r"number of parameters on[^:]*: (\d+)")


def rounded(value: Any, digits: int = 4) -> Any:
    """The same lists and dicts of floats with so many significant digits."""
    if isinstance(value, dict):
        return {name: rounded(one, digits) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one, digits) for one in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{digits}g}")
    return value


def _lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a file by step; where two pieces of a run overlap, the later one counts."""
    file = folder / "tensorboard" / name
    if not file.exists():
        return []
    by_step = {one["step"]: one for one in map(strict_json.read, file.read_text().splitlines())}
    return [by_step[step] for step in sorted(by_step)]


def effective(weights: list[float]) -> float:
    """How many of n weights count: exp of the entropy of their shares; n where all are equal."""
    sizes = [abs(weight) for weight in weights]
    total = sum(sizes) or 1.0
    shares = [size / total for size in sizes if size]
    return math.exp(-sum(share * math.log(share) for share in shares))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def summary(line: dict[str, Any]) -> dict[str, Any]:
    """A logged step in a few numbers: means over sites, but for the composite gains.

    read and written: how many streams count in H_pre and H_post (`effective`); apart: 1 minus the
    cosine of pairs of streams, 0 where they are all the same; away: the distance of H_res from the
    identity, and the smallest and largest of a site.
    """
    site = line["site"]
    return {
        "step": line["step"],
        "forward": site["depth_gain_forward_mean"][-1],
        "forward_max": site["depth_gain_forward_max"][-1],
        "backward": site["depth_gain_backward_mean"][0],
        "backward_max": site["depth_gain_backward_max"][0],
        "away": [pick(site["to_identity"]) for pick in (_mean, min, max)],
        "read": _mean([effective(row) for row in site["h_pre"]]),
        "written": _mean([effective(row) for row in site["h_post"]]),
        "apart": 1 - _mean(site["stream_cosine"]),
        "gradient_norm": line["gradient_norm"],
    }


def updates(line: dict[str, Any]) -> dict[str, Any]:
    """A line of `updates.Watch`: [gradient, root, update, small] of each group."""
    names = ("gradient", "root", "update", "small")
    groups = {group: [sizes[name] for name in names] for group, sizes in line["groups"].items()}
    return {"step": line["step"], "groups": groups}


def last_sites(line: dict[str, Any]) -> dict[str, Any]:
    """What each site does at the last logged step, for heat maps."""
    kept = {name: line["site"][name] for name in ("to_identity", "h_pre", "h_post")}
    return {"step": line["step"], "sites": line["sites"], "h_res": line["h_res"], **kept}


def hardware() -> str:
    """The GPUs' name, or CPU."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return ", ".join(dict.fromkeys(found.split("\n")[:-1]))
    return "CPU"


def versions() -> dict[str, str]:
    """Of the packages that matter, and of the sources where git knows it."""
    found = {}
    for name in ("torch", "triton", "megatron-core", "transformer-engine"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    command = ["git", "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found["commit"] = done.stdout.strip()
    return found


def _whole(curve: Curve, steps: int) -> list[float | None]:
    """A value a step from 1 on; None where there is none."""
    by_step = dict(zip(*curve, strict=True))
    return [by_step.get(step) for step in range(1, steps + 1)]


def _pairs(curve: Curve) -> list[list[float]]:
    return [list(pair) for pair in zip(*curve, strict=True)]


def collect(run: Run) -> dict[str, Any] | None:
    """All that is kept of a run; None where it has made no step yet."""
    read = curves(run.folder / "tensorboard", *TAGS.values())
    found = {name: read[tag] for name, tag in TAGS.items()}
    if not found["loss"].steps:
        return None
    noted, steps = run.noted, found["loss"].steps[-1]
    parameters = PARAMETERS.findall(run.log.read_text(errors="replace"))
    kept: dict[str, Any] = {
        **{name: noted[name] for name in (*run.described, "state", "seconds")},
        "hardware": hardware(),
        "versions": versions(),
        "steps": steps,
        "loss": rounded(_whole(found["loss"], steps), 5),
        "gradient_norm": rounded(_whole(found["gradient_norm"], steps), 3),
        "validation": rounded(_pairs(found["validation"]), 6),
        "step_seconds": rounded(_pairs(found["step_seconds"])),
    }
    if parameters:
        kept["parameters"] = int(parameters[-1])
    if found["memory"].values:
        kept["memory"] = max(found["memory"].values)
    if logged := _lines(run.folder, METRICS_FILE):
        kept["logged"] = rounded([summary(line) for line in logged])
        kept["last"] = rounded(last_sites(logged[-1]), 3)
    kept["updates"] = rounded([updates(line) for line in _lines(run.folder, UPDATES_FILE)], 3)
    return kept


def keep(run: Run) -> None:
    """Write a run's curves to its file, over what an earlier piece left there."""
    assert run.curves is not None
    if (kept := collect(run)) is not None:
        run.curves.parent.mkdir(parents=True, exist_ok=True)
        compact = json.dumps(json.loads(strict_json.written(kept)), separators=(",", ":"))
        run.curves.write_text(compact + "\n")


def load(folder: Path) -> list[dict[str, Any]]:
    """All curves below a folder.

    Raises:
        SystemExit: they were made from different data.
    """
    found = [strict_json.read(file.read_text()) for file in sorted(folder.rglob("*.json"))]
    if len({one["data"]["digest"] for one in found}) > 1:
        raise SystemExit(f"stability: the runs in {folder} were trained on different data")
    return found
