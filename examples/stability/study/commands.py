"""From a plan to runs: the folder and the command line of each."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .plans import MODELS, PLANS, Job, Size
from .runs import ROOT, Run

COMMON = (
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu"),
    *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--tokenizer-type", "NullTokenizer"),
    *("--make-vocab-size-divisible-by", "8", "--no-create-attention-mask-in-dataloader"),
    *("--lr-decay-style", "cosine", "--weight-decay", "0.1", "--adam-beta2", "0.95"),
    *("--clip-grad", "1.0", "--tensorboard-log-interval", "1", "--save-interval", "1000000"),
    *("--ckpt-format", "torch_dist", "--exit-signal-handler", "--logging-level", "30"),
)
"""Flags of every run of the study, the older sizes' too."""
WARM_UP = 20
"""One part in so many of a whole run's steps, for shorter runs too: what a rate does to the first
steps depends on how fast it is reached, so a sweep with a shorter warm-up would rank other runs."""
VALIDATIONS = 32
LOGGED = 20
"""Steps of a run at which mHC's metrics and updates are written."""
MAIN = ROOT / "examples" / "stability" / "pretrain.py"


def every(steps: int, times: int) -> int:
    """The interval that makes about so many of so many steps."""
    return max(1, steps // times)


def evaluations(data: Mapping[str, Any], size: Size) -> int:
    """Batches of one validation: all held-out text that fills them, up to the size's limit."""
    return max(1, min(data["valid_tokens"], size.validation) // size.step)


def rate_of(job: Job, rates: Mapping[str, float]) -> float:
    """The job's own rate, or its model's best.

    Raises:
        SystemExit: nothing says what is best.
    """
    if job.rate is not None:
        return job.rate
    if job.rate_of not in rates:
        sys.exit(
            f"stability: no finished run of {job.rate_of} in the sweep says what rate is best for"
            f" {job.model}: run --plan sweep first, or give --rate {job.rate_of}=RATE"
        )
    return rates[job.rate_of]


def arguments(
    job: Job, size: Size, steps: int, warm_up: int, rate: float, folder: Path, data: Path
) -> list[str]:
    """What follows `python -m megatron_mhc.run`, but for --load."""
    held = json.loads((data / "data.json").read_text())
    mhc = MODELS[job.model]
    if mhc:
        mhc = (*mhc, "--mhc-log-interval", str(every(steps, LOGGED)))
    if mhc and size.fusing:
        mhc = (*mhc, "--mhc-backend", "triton")
    memory = ("--log-memory-to-tensorboard",) if size.fusing else ()
    return [
        *(*size.runner, str(MAIN), *COMMON, *size.flags, *memory),
        *(size.moe if job.model.startswith("moe_") else ()),
        *("--seq-length", str(size.sequence), "--max-position-embeddings", str(size.sequence)),
        *("--micro-batch-size", str(size.micro_batch(job.model))),
        *("--global-batch-size", str(size.batch), "--vocab-size", str(size.vocab_size)),
        *("--train-data-path", str(data / "train"), "--valid-data-path", str(data / "valid")),
        *("--data-cache-path", str(folder / "cache"), "--save", str(folder / "checkpoints")),
        *("--tensorboard-dir", str(folder / "tensorboard"), "--log-timers-to-tensorboard"),
        *("--log-interval", str(every(steps, 128)), "--train-iters", str(steps)),
        *("--eval-interval", str(every(steps, VALIDATIONS if steps >= 200 else 4))),
        *("--eval-iters", str(evaluations(held, size))),
        *("--lr-warmup-iters", str(warm_up), "--lr", str(rate)),
        *("--min-lr", str(rate / 10), "--seed", str(job.seed), *mhc),
    ]


def _named(job: Job, rates: Mapping[str, float]) -> str:
    return f"{job.model} of seed {job.seed} at {job.rate or rates.get(job.rate_of, 'no rate yet')}"


def runs_of(
    plan: str,
    size: Size,
    *,
    tokens: int,
    rates: Mapping[str, float],
    models: list[str] | None,
    seeds: list[int] | None,
    learning_rates: list[float] | None,
    folder: Path,
    curves: Path,
    data: Path,
    more: list[str],
) -> list[Run]:
    """The runs of a plan, in the order in which they are wanted.

    Args:
        plan: a name of `PLANS`.
        size: what is trained.
        tokens: of a whole run.
        rates: the best rate of each model, where a job has none of its own.
        models, seeds, learning_rates: the only ones that are wanted; None: all.
        folder: of the size's runs; curves: of its curves; data: of `prepare_text.py`.
        more: flags for Megatron that are added to all.

    Raises:
        SystemExit: the plan has no such run.
    """
    made = json.loads((data / "data.json").read_text())
    kept = ("digest", "train_tokens", "valid_tokens", "valid_bytes")
    warm_up = every(round(tokens / size.step), WARM_UP)
    found = []
    for job in PLANS[plan]:
        if job.model not in (models or MODELS) or job.seed not in (seeds or [job.seed]):
            continue
        steps = max(8, round(tokens * job.part / size.step))
        rate = rate_of(job, rates)
        if rate not in (learning_rates or [rate]):
            continue
        name = f"{job.model}-lr{rate:g}-seed{job.seed}-{steps}steps"
        described = {"model": job.model, "learning_rate": rate, "seed": job.seed, "plan": plan}
        described |= {"train_iters": steps, "warm_up": warm_up, "tokens_per_step": size.step}
        described |= {"data": {key: made[key] for key in kept}, "flags": more}
        own = folder / plan / name
        command = [*arguments(job, size, steps, warm_up, rate, own, data), *more]
        found.append(Run(own, described, command, curves / plan / f"{name}.json"))
    if not found:
        has = dict.fromkeys(_named(job, rates) for job in PLANS[plan])
        sys.exit(f"stability: nothing of that is in plan {plan}, which has {', '.join(has)}")
    return found
