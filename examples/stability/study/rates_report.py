"""The tables of a study without a plan, from what its runs left behind.

Losses are means over 10 steps, since one batch says little. A run broke if a loss or gradient was
no number, if that mean rose by more than half a nat above the lowest it had been, or if from some
step to the end all gradients were exactly 0, so that nothing learns any more. Gains and
distances are means over the tokens of a logged step; gains are of the composite H_res of all sites.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mhc.tools.plot_runs import Run, largest, read_run

from .markdown import table
from .statistics import SURGE, dead_from, means, surge


class Row(NamedTuple):
    """A run's settings and its numbers."""

    model: str
    rate: float
    seed: int
    state: str
    run: Run

    @property
    def loss(self) -> float:
        """The mean training loss of the last steps, nats a byte."""
        return means(self.run.loss.values)[-1]

    @property
    def surge(self) -> float:
        """The largest rise of the mean loss above its minimum so far, nats."""
        return surge(self.run.loss.values)

    @property
    def dead(self) -> int | None:
        """The step from which to the end all gradients are exactly 0, if there is one."""
        return dead_from(*self.run.gradient_norm)

    @property
    def outcome(self) -> str:
        """finished, broke, stopped or failed."""
        if self.dead is not None:
            return f"broke: gradients 0 from step {self.dead}"
        return "broke" if self.surge > SURGE else self.state


def read(folder: Path) -> list[Row]:
    """The runs of a study, at rising rates.

    Raises:
        SystemExit: there are none.
    """
    rows = []
    for file in sorted(folder.glob("*/run.json")):
        made: dict[str, Any] = json.loads(file.read_text())
        run = read_run(f"{made['model']}={file.parent}")
        rows.append(Row(made["model"], made["learning_rate"], made["seed"], made["state"], run))
    if not rows:
        raise SystemExit(f"report: no runs in {folder}; run.py makes them")
    order = ("ordinary", "hc", "mhc")
    return sorted(rows, key=lambda row: (row.seed, row.rate, order.index(row.model)))


def runs_table(rows: list[Row]) -> str:
    """A line for each run."""
    head = ["model", "peak rate", "seed", "steps", "outcome", "last loss", "largest rise"]
    head += ["largest gradient norm", "gain forward: first, last, largest"]
    head += ["gain backward: first, last, largest", "H_res from identity: first, last"]
    lines = []
    for row in rows:
        run = row.run
        line = [row.model, f"{row.rate:g}", str(row.seed), str(run.loss.steps[-1]), row.outcome]
        line += [f"{row.loss:.3f}", f"{row.surge:.3f}", f"{max(run.gradient_norm.values):.3g}"]
        for way in ("forward", "backward") if run.logged else ():
            gain = run.over_steps(f"gain_{way}_mean").values
            line.append(f"{gain[0]:.4g}, {gain[-1]:.4g}, {largest(gain):.4g}")
        if run.logged:
            ends = (run.logged[0]["site"]["to_identity"], run.logged[-1]["site"]["to_identity"])
            line.append(", ".join(f"{sum(values) / len(values):.3g}" for values in ends))
        lines.append(line + ["–"] * (len(head) - len(line)))
    return table(head, lines)


def gaps_table(rows: list[Row]) -> str:
    """The last loss of HC and mHC minus the ordinary model's, where both came equally far."""
    found = {(row.model, row.rate, row.seed): row for row in rows}
    lines = []
    for row in rows:
        ordinary = found.get(("ordinary", row.rate, row.seed))
        if row.model != "ordinary" and ordinary is not None:
            same = row.run.loss.steps[-1] == ordinary.run.loss.steps[-1]
            gap = f"{row.loss - ordinary.loss:+.3f}" if same else "other steps"
            lines.append([row.model, f"{row.rate:g}", str(row.seed), gap])
    return table(["model", "peak rate", "seed", "loss minus the ordinary model's"], lines)


def report(folder: Path) -> str:
    """Both tables."""
    rows = read(folder)
    return f"{runs_table(rows)}\n\n{gaps_table(rows)}"
