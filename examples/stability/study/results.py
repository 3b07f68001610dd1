"""The results of runs, from their curves: what tables and pictures are made of."""

import math
import statistics
from typing import Any

from . import plans
from .statistics import Points, band, outcome, spikes

ORDER = list(plans.MODELS)


class Result:
    """A run's curves, and what follows from them by the rules of `statistics`."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.kept = kept
        self.model: str = kept["model"]
        self.rate: float = kept["learning_rate"]
        self.seed: int = kept["seed"]
        self.plan: str = kept["plan"]
        self.losses: list[float] = kept["loss"]
        self.memory: float | None = kept.get("memory")
        self.logged: list[dict[str, Any]] = kept.get("logged", [])
        self.step_time = self.median_step
        """Seconds a step. In a `Study` the least median of the model's runs on that hardware: a
        host that is busy with something else can only make steps longer."""

    @property
    def outcome(self) -> str:
        """finished, stopped, failed, or broke and why."""
        return outcome(self.losses, self.kept["gradient_norm"], self.kept["state"])

    @property
    def is_whole(self) -> bool:
        """Whether it came to its end and learned until then."""
        return self.outcome == "finished"

    @property
    def tokens(self) -> int:
        """Trained on."""
        return self.kept["steps"] * self.kept["tokens_per_step"]

    @property
    def validation(self) -> Points:
        """(tokens, nats a token)."""
        a_step = self.kept["tokens_per_step"]
        return [(step * a_step, loss) for step, loss in self.kept["validation"]]

    @property
    def loss(self) -> float | None:
        """The last validation loss, nats a token."""
        return self.validation[-1][1] if self.validation else None

    @property
    def median_step(self) -> float | None:
        """The median time of its own steps, seconds."""
        times = [seconds for _, seconds in self.kept["step_seconds"]]
        return statistics.median(times) if times else None

    @property
    def seconds(self) -> float | None:
        """Steps times the time of one: training alone."""
        return None if self.step_time is None else self.step_time * self.kept["steps"]

    @property
    def over_time(self) -> Points:
        """(seconds, nats a token) of validation, by the time of a step."""
        if self.step_time is None:
            return []
        return [(step * self.step_time, loss) for step, loss in self.kept["validation"]]

    @property
    def spikes(self) -> list[int]:
        """The steps at which the training loss spikes."""
        return spikes(self.losses, self.kept["warm_up"])

    def logged_over_tokens(self, name: str) -> Points:
        """(tokens, value) of a number of the logged steps; the first of several."""
        pick = (
            line[name][0] if isinstance(line[name], list) else line[name] for line in self.logged
        )
        a_step = self.kept["tokens_per_step"]
        return list(zip((line["step"] * a_step for line in self.logged), pick, strict=True))


class Study:
    """All results of a size."""

    def __init__(self, results: list[Result]) -> None:
        self.results = sorted(results, key=lambda r: (ORDER.index(r.model), r.rate, r.seed))
        least: dict[tuple[str, str], float] = {}
        for r in self.results:
            if r.median_step is not None:
                kind = r.model, r.kept["hardware"]
                least[kind] = min(r.median_step, least.get(kind, math.inf))
        for r in self.results:
            r.step_time = least.get((r.model, r.kept["hardware"]))

    def of(self, plan: str, model: str | None = None) -> list[Result]:
        """Those of a plan, and of a model, that count.

        Where each model takes its best rate, runs at others do not, if there are any at it: a mean
        over seeds is of one rate.
        """
        found = [r for r in self.results if r.plan == plan and model in (None, r.model)]
        if plan not in plans.AT_BEST:
            return found
        best = self.best_rates()
        at_best = {r.model for r in found if r.rate == best.get(plans.swept_as(r.model))}
        return [
            r for r in found if r.model not in at_best or r.rate == best[plans.swept_as(r.model)]
        ]

    def models(self, plan: str) -> list[str]:
        """The models that a plan has results of."""
        return list(dict.fromkeys(result.model for result in self.of(plan)))

    def whole(self, plan: str, model: str) -> list[Result]:
        """The seeds of a model that came to the end."""
        return [result for result in self.of(plan, model) if result.is_whole]

    def band(self, plan: str, model: str) -> list[tuple[float, float, float, float]]:
        """Validation over tokens: (tokens, mean, lowest, highest) over the seeds that ended."""
        return band([result.validation for result in self.whole(plan, model)])

    def last_loss(self, plan: str, model: str) -> float | None:
        """The mean last validation loss over seeds that came to the end."""
        losses = [result.loss for result in self.whole(plan, model) if result.loss is not None]
        return statistics.fmean(losses) if losses else None

    def best_of_sweep(self, model: str) -> Result | None:
        """The swept run with the lowest last loss that came to the end."""
        found = [r for r in self.whole("sweep", model) if r.loss is not None]
        return min(found, key=lambda r: r.loss or math.inf, default=None)

    def best_rates(self) -> dict[str, float]:
        """Of each model that was swept the best rate."""
        best = {model: self.best_of_sweep(model) for model in self.models("sweep")}
        return {model: result.rate for model, result in best.items() if result is not None}
