"""The tables that put models beside the ordinary one: for the same tokens, loss and time."""

from . import statistics as rules
from .markdown import NONE, number, table
from .results import Result, Study

REFERENCE = "ordinary"
PAIRS = (("main", REFERENCE), ("moe", "moe_ordinary"))
"""Plans whose models are compared with one of them."""


def gib(value: float | None) -> float | None:
    """Bytes in GiB."""
    return None if value is None else value / 2**30


def _spread(values: list[float], form: str = ".4f") -> str:
    if not values:
        return NONE
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:{form}}"
    return f"{mean:{form}} ({min(values):{form}} to {max(values):{form}})"


def compared(study: Study) -> str:
    """Last validation loss (nats a token): mean and range over seeds that came to the end.

    Milliseconds a step: the least median of the model's runs, of all plans, on that hardware.
    """
    head = ["model", "rate", "seeds", "validation loss", "minus the ordinary model's, same seed"]
    head += ["ms a step", "of the ordinary model's", "GiB", "spikes a run"]
    rows = []
    for plan, reference in PAIRS:
        base = {r.seed: r for r in study.whole(plan, reference)}
        base_time = [r.step_time for r in base.values() if r.step_time]
        for model in study.models(plan):
            of, whole = study.of(plan, model), study.whole(plan, model)
            losses = [r.loss for r in whole if r.loss is not None]
            gaps = [
                r.loss - base[r.seed].loss
                for r in whole
                if r.seed in base and model != reference and None not in (r.loss, base[r.seed].loss)
            ]
            times = [r.step_time for r in whole if r.step_time]
            ratio = None
            if times and base_time:
                ratio = sum(times) / len(times) / (sum(base_time) / len(base_time))
            memory = max((r.memory or 0 for r in of), default=0) or None
            rates = ", ".join(dict.fromkeys(f"{r.rate:g}" for r in of))
            row = [model, rates, f"{len(whole)} of {len(of)}", _spread(losses)]
            row += [_spread(gaps, "+.4f"), _spread([1000 * t for t in times], ".0f")]
            row += [number(ratio, ".2f"), number(gib(memory), ".1f")]
            rows.append([*row, ", ".join(str(len(r.spikes)) for r in of)])
    return table(head, rows)


def convergence(study: Study) -> str:
    """How many tokens the ordinary model needs for a model's last loss, over that model's tokens.

    On the curves: where the ordinary model's mean validation curve first comes so low; "not
    reached" if it does not within its run. By whole runs: of two ordinary runs that decayed to
    their ends, straight in log tokens: the long ones' mean, and the plan `longer`'s; beyond the two
    it is an extrapolation, and said to be. The other way: the ordinary model's tokens over those at
    which the model's curve, whose rate has not decayed there yet, first has its last loss.
    """
    head = ["model", "its last loss", "factor on the curves", "factor by whole runs"]
    head += ["the other way"]
    rows = []
    for plan, reference in PAIRS:
        base = [(x, mean) for x, mean, *_ in study.band(plan, reference)]
        for model in study.models(plan) if base else []:
            own = [(x, mean) for x, mean, *_ in study.band(plan, model)]
            if model == reference or not own:
                continue
            tokens, level = own[-1]
            reached, back = rules.reached(base, level), rules.reached(own, base[-1][1])
            on_curves = f"not reached: above {base[-1][0] / tokens:.2f}"
            if reached is not None:
                on_curves = f"{reached / tokens:.2f}"
            row = [model, f"{level:.4f}", on_curves]
            row += [_by_whole_runs(whole_runs(study, plan), level, tokens)]
            rows.append([*row, "not reached" if back is None else f"{base[-1][0] / back:.2f}"])
    return table(head, rows)


def whole_runs(study: Study, plan: str) -> list[tuple[float, float]]:
    """(tokens, last loss) of the long ordinary runs and of a longer one; or none.

    The sweep's runs are no substitute: they end where losses still fall several times as fast.
    """
    base = study.band("main", REFERENCE) if plan == "main" else []
    longer = study.band("longer", REFERENCE)
    return [base[-1][:2], longer[-1][:2]] if base and longer else []


def _by_whole_runs(two: list[tuple[float, float]], level: float, tokens: float) -> str:
    if not two:
        return NONE
    needed = rules.tokens_for(*two, level)
    if needed is None:
        return "the longer run is no better"
    return f"{needed / tokens:.2f}{_outside(two, needed)}"


def _outside(two: list[tuple[float, float]], tokens: float) -> str:
    return "" if two[0][0] <= tokens <= two[1][0] else " (extrapolated)"


def at_equal_time(study: Study) -> str:
    """Validation loss once each has trained as long as the fastest: steps times the time of one.

    A slower model's rate has not decayed to its end by then. So beside it: its own last loss, and
    that of an ordinary run which decays to its end in the same time, by whole runs as above.
    """
    head = ["model", "seconds", "validation loss", "seconds to its end", "its last loss"]
    head += ["an ordinary run of these seconds"]
    rows = []
    for plan, reference in PAIRS:
        whole = {model: study.whole(plan, model) for model in study.models(plan)}
        times = [r.over_time[-1][0] for runs in whole.values() for r in runs if r.over_time]
        for model, runs in whole.items() if times else []:
            values = [rules.value_at(r.over_time, min(times)) for r in runs]
            losses = [value for value in values if value is not None]
            mark = " (reference)" if model == reference else ""
            row = [model + mark, f"{min(times):.0f}", _spread(losses)]
            rows.append([*row, *_to_the_end(study, plan, reference, runs)])
    return table(head, rows)


def _to_the_end(study: Study, plan: str, reference: str, runs: list[Result]) -> list[str]:
    seconds = [r.seconds for r in runs if r.seconds is not None]
    last = [r.loss for r in runs if r.loss is not None]
    a_token = [r.seconds / r.tokens for r in study.whole(plan, reference) if r.seconds]
    two = whole_runs(study, plan)
    if not (seconds and a_token):
        return [NONE, _spread(last), NONE]
    own = sum(seconds) / len(seconds)
    if not two or runs[0].model == reference:
        return [f"{own:.0f}", _spread(last), NONE]
    tokens = own / (sum(a_token) / len(a_token))
    said = f"{rules.loss_after(two[0], two[1], tokens):.4f}{_outside(two, tokens)}"
    return [f"{own:.0f}", _spread(last), said]
