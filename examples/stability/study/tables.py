"""The tables of the evidence, a function each, from a study to Markdown."""

import math
from collections.abc import Callable

from .comparisons import at_equal_time, compared, convergence, gib
from .markdown import NONE, number, table
from .results import Result, Study

MILLION = 1e6


def _milliseconds(result: Result) -> float | None:
    return None if result.median_step is None else 1000 * result.median_step


def speed(study: Study) -> str:
    """By the median step; and what 15 minutes of steps come to."""
    rows = []
    for r in [r for r in study.of("speed") if r.median_step]:
        a_second = r.kept["tokens_per_step"] / r.median_step
        row = [r.model, number(_milliseconds(r), ".0f"), f"{a_second:,.0f}"]
        rows.append([*row, f"{900 * a_second / MILLION:.0f}", number(gib(r.memory), ".1f")])
    head = ["model", "ms a step", "tokens a second", "million tokens in 15 minutes", "GiB"]
    return table(head, rows)


def swept(study: Study) -> str:
    """Last validation loss by rate: after a third (sweep), a sixth (breaks) and all (main) of a
    whole run; several seeds: their mean."""
    parts = []
    for plan in ("sweep", "breaks", "main"):
        of = [r for r in study.results if r.plan == plan]
        rates = sorted({r.rate for r in of})
        rows = []
        for model in dict.fromkeys(r.model for r in of):
            row = [f"{model}, {plan}"]
            for rate in rates:
                found = [r for r in of if (r.model, r.rate) == (model, rate)]
                whole = [r.loss for r in found if r.is_whole and r.loss is not None]
                cells = [number(sum(whole) / len(whole), ".4f")] if whole else []
                row.append(", ".join([*cells, *(r.outcome for r in found if not r.is_whole)]))
            rows.append([cell or NONE for cell in row])
        parts.append(table(["model", *(f"{rate:g}" for rate in rates)], rows) if rows else "")
    return "\n\n".join(part for part in parts if part)


def breaking(study: Study) -> str:
    """The lowest rate at which a run broke; a loss of more than half a nat above its lowest mean of
    10 steps, no number, or gradients that are 0 from some step on."""
    rows = []
    for model in dict.fromkeys(r.model for r in study.results):
        of = [r for r in study.results if r.model == model]
        broke = [r for r in of if r.outcome.startswith("broke")]
        lowest = min(broke, key=lambda r: r.rate, default=None)
        whole = max((r.rate for r in of if r.is_whole), default=None)
        said = NONE if lowest is None else f"{lowest.rate:g} ({lowest.outcome}, {lowest.plan})"
        rows.append([model, said, number(whole, "g")])
    return table(["model", "lowest rate that broke it", "highest that it came through"], rows)


def _ends(result: Result, pick: Callable[[dict], float], form: str = ".3g") -> str:
    values = [pick(line) for line in result.logged]
    worst = math.nan if any(map(math.isnan, values)) else max(values)
    return f"{values[0]:{form}}, {values[-1]:{form}}, {worst:{form}}"


def streams(study: Study) -> str:
    """First, last and largest logged: composite gains (of the product of all H_res, means over
    tokens), distance of H_res from the identity (mean over sites), how many streams a site reads
    from and writes to (exp of the entropy of H_pre and H_post), 1 minus the cosine of streams."""
    head = ["model", "plan", "rate", "seed", "gain forward", "gain backward"]
    head += ["H_res from identity", "streams read", "streams written", "1 - cosine"]
    rows = []
    for plan in ("main", "moe", "ablations"):
        for r in study.of(plan):
            if not r.logged:
                continue
            row = [r.model, plan, f"{r.rate:g}", str(r.seed)]
            row += [_ends(r, lambda line, way=way: line[way]) for way in ("forward", "backward")]
            row.append(_ends(r, lambda line: line["away"][0]))
            row += [
                _ends(r, lambda line, name=name: line[name])
                for name in ("read", "written", "apart")
            ]
            rows.append(row)
    return table(head, rows)


def adam(study: Study) -> str:
    """What Adam makes of mHC's parameters, at the first, middle and last logged step: root mean
    squares over all sites of the gradient after clipping and of the root of Adam's second moment
    (eps, 1e-8 but in mhc_eps, stands beside it), the step in learning rates (1: as large as Adam
    makes them), and the share of elements whose root is below ten times eps. Of others than mhc:
    those of H_res."""
    head = ["model", "group", "step", "gradient", "root", "step in rates", "below ten eps"]
    rows = []
    for plan, models in (
        ("main", ("mhc", "mhc_zero", "hc")),
        ("ablations", ("mhc_fast", "mhc_eps", "mhc_zero_random")),
    ):
        for r in [r for model in models for r in study.of(plan, model)[:1]]:
            lines = r.kept["updates"]
            chosen = {line["step"]: line for line in lines[:1] + lines[len(lines) // 2 :: 10**9]}
            chosen |= {line["step"]: line for line in lines[-1:]}
            groups = list(lines[-1]["groups"]) if lines else []
            for group in (g for g in groups if r.model == "mhc" or g.endswith("res")):
                for step, line in chosen.items():
                    gradient, root, update, small = line["groups"][group]
                    row = [r.model, group, str(step), f"{gradient:.2g}", f"{root:.2g}"]
                    rows.append([*row, f"{update:.2g}", f"{small:.0%}"])
    return table(head, rows)


def ablations(study: Study) -> str:
    """Last validation loss beside that of the sweep's mhc at the same rate and length."""
    head = ["model", "rate", "outcome", "validation loss", "minus mhc's"]
    head += ["H_res from identity, last", "gain backward, largest", "ms a step"]
    base = {r.rate: r for r in study.whole("sweep", "mhc")}
    runs = [r for r in study.of("sweep") if r.model in ("mhc", "mhc_zero") and r.rate in base]
    wanted = {r.rate for r in study.of("ablations")}
    rows = []
    for r in [r for r in runs if r.rate in wanted] + study.of("ablations"):
        reference = base.get(r.rate)
        gap = None
        if reference is not None and reference is not r and None not in (r.loss, reference.loss):
            gap = r.loss - reference.loss
        row = [r.model, f"{r.rate:g}", r.outcome, number(r.loss, ".4f"), number(gap, "+.4f")]
        away = r.logged[-1]["away"][0] if r.logged else None
        gain = max((line["backward"] for line in r.logged), default=None)
        row += [number(away, ".3g"), number(gain, ".3g"), number(_milliseconds(r), ".0f")]
        rows.append(row)
    return table(head, rows)


def every_run(study: Study) -> str:
    """Every run, its own median step, the minutes of its processes (start and validation too)."""
    head = ["plan", "model", "rate", "seed", "million tokens", "outcome", "validation loss"]
    head += ["spikes at steps", "largest gradient norm", "ms a step", "GiB", "minutes"]
    rows = []
    for r in study.results:
        norms = list(filter(math.isfinite, r.kept["gradient_norm"]))
        row = [r.plan, r.model, f"{r.rate:g}", str(r.seed), f"{r.tokens / MILLION:.1f}"]
        row += [r.outcome, number(r.loss, ".4f"), ", ".join(map(str, r.spikes)) or "none"]
        row += [number(max(norms, default=None), ".3g"), number(_milliseconds(r), ".0f")]
        row += [number(gib(r.memory), ".1f"), f"{r.kept['seconds'] / 60:.1f}"]
        rows.append(row)
    return table(head, rows)


def made_of(study: Study) -> str:
    """A paragraph: hardware, versions, data, hours."""
    first = study.results[0].kept
    hours = sum(r.kept["seconds"] for r in study.results) / 3600
    cards = ", ".join(dict.fromkeys(r.kept["hardware"] for r in study.results))
    found = dict.fromkeys(
        " ".join(f"{k} {v}" for k, v in r.kept["versions"].items()) for r in study.results
    )
    data = first["data"]
    return (
        f"{len(study.results)} runs, {hours:.2f} hours of processes, on {cards}; "
        f"{'; '.join(found)}."
        f" Data: {data['train_tokens']:,} tokens to train on, {data['valid_tokens']:,} held out"
        f" ({data['valid_tokens'] / data['valid_bytes']:.3f} tokens a byte), digest"
        f" {data['digest'][:16]}."
    )


PARTS: dict[str, Callable[[Study], str]] = {
    "Compared": compared,
    "Tokens for the same loss": convergence,
    "At equal time": at_equal_time,
    "Speed": speed,
    "Rates": swept,
    "Where each breaks": breaking,
    "Streams": streams,
    "What Adam makes of them": adam,
    "Ablations": ablations,
    "Every run": every_run,
}


def report(study: Study) -> str:
    """All tables that there are runs for, each below its title and explanation."""
    parts = [made_of(study)]
    for title, make in PARTS.items():
        text = make(study)
        if text.count("\n") > 1:
            said = " ".join((make.__doc__ or "").split())
            parts.append(f"### {title}\n\n{said}\n\n{text}")
    return "\n\n".join(parts)
