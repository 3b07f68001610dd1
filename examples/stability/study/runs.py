"""A training run of the study: its folder, its command, what became of it."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
NOT_FINITE = re.compile(r"is not finite|found NaN|found Inf|NaN in local grad|Inf in local grad")
"""What the main script and Megatron say when a loss or a gradient is no number."""
STOPPED = "exiting program"
"""What Megatron says when it has saved and ends before the last step."""
UPDATES_FILE = "mhc_updates.jsonl"
"""Below --tensorboard-dir: a line a logged step, {"step": S, "groups": {group: sizes}}."""
DONE = ("finished", "broke")
"""States after which a run is not started again (to break is what the study looks for)."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One model at one rate and seed, and the folder that holds all of it.

    Attributes:
        folder: where its checkpoints, logs and run.json lie.
        described: what run.json says of it: model, learning_rate, seed and more.
        arguments: what follows `python -m megatron_mhc.run`, but for checkpoints.
        curves: the file of its curves, if there are to be any; where that says that the run is
            done, it is, though the folder is gone.
    """

    folder: Path
    described: dict[str, Any]
    arguments: list[str]
    curves: Path | None = None

    @property
    def log(self) -> Path:
        """All that its last process printed."""
        return self.folder / "train.log"

    @property
    def noted(self) -> dict[str, Any]:
        """What run.json holds; empty before the first process has ended."""
        file = self.folder / "run.json"
        return json.loads(file.read_text()) if file.exists() else {}

    @property
    def state(self) -> str:
        """finished, broke, stopped, failed or new."""
        if not self.noted and self.curves is not None and self.curves.exists():
            kept = json.loads(self.curves.read_text())["state"]
            return kept if kept in DONE else "new"
        return self.noted.get("state", "new")

    def command(self) -> list[str]:
        """Trains it, from its checkpoint if it has one."""
        checkpoints = self.folder / "checkpoints"
        resume = ["--load", str(checkpoints)] if checkpoints.is_dir() else []
        return [sys.executable, "-m", "megatron_mhc.run", *self.arguments, *resume]

    def close(self, code: int, stopped: bool, seconds: float, command: list[str]) -> str:
        """Note what became of it; what is finished needs no checkpoint any more."""
        log = self.log.read_text(errors="replace")
        if code == 0:
            state = "stopped" if STOPPED in log else "finished"
        elif stopped:
            state = "stopped"
        else:
            state = "broke" if NOT_FINITE.search(log) else "failed"
        if state in DONE:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        seconds += self.noted.get("seconds", 0)
        described = {**self.described, "state": state, "exit_code": code}
        described |= {"seconds": round(seconds, 1), "command": command}
        (self.folder / "run.json").write_text(json.dumps(described, indent=2) + "\n")
        return state
