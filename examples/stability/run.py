"""Trains ordinary, HC and mHC models of one size, on the same data and seeds.

    python examples/stability/run.py tiny                        # CPU, minutes
    python examples/stability/run.py single_gpu --budget 270     # a GPU, a piece of 270 seconds
    python examples/stability/run.py tiny --models mhc --seq-length 128   # more flags: Megatron's

Every model at every rate and seed; deep, narrow models leave most of a GPU idle, so `--jobs` runs
share one. With a plan (speed, sweep, breaks, main, longer, moe, ablations: `study/plans.py`)
instead the evidence at a size that matters, one run a GPU, on the text of installed packages:

    python examples/stability/run.py paper_ratio --plan sweep --gpus 4 --budget 540
    python examples/stability/run.py tiny --plan main --rate ordinary=0.01 --rate mhc=0.01 ...

Once the budget is spent, the runs have saved a checkpoint and stopped; the same command goes on
from there, and starts no run that is finished. A plan's curves are written to --curves; what is
finished there is not run again. Then `report.py` makes the tables.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from study import curves, plans
from study.commands import COMMON, runs_of
from study.results import Result, Study
from study.runs import ROOT, Run
from study.schedule import Budget, Schedule, places

MAIN = ROOT / "examples" / "pretrain_gpt.py"
DATA = ROOT / "examples" / "prepare_data.py"
EXAMPLE = ROOT / "examples" / "stability"
MODELS = {name: list(plans.MODELS[name]) for name in ("ordinary", "hc", "mhc")}


@dataclasses.dataclass(frozen=True)
class Size:
    """A size that is trained without a plan.

    Attributes:
        flags: Megatron's, for the model, the batch and the device.
        runner: megatron_mhc.run's own flags.
        iterations: training steps of each run.
        learning_rates: peak rates.
        jobs: runs at a time.
        budget: seconds, None for as long as it takes.
    """

    flags: tuple[str, ...]
    runner: tuple[str, ...]
    iterations: int
    learning_rates: tuple[float, ...]
    jobs: int
    budget: float | None


def _model(layers: int, hidden: int, ffn: int, heads: int, sequence: int, batch: int) -> list[str]:
    return [
        *("--num-layers", str(layers), "--hidden-size", str(hidden)),
        *("--ffn-hidden-size", str(ffn), "--num-attention-heads", str(heads)),
        *("--seq-length", str(sequence), "--max-position-embeddings", str(sequence)),
        *("--micro-batch-size", str(batch), "--global-batch-size", str(batch)),
    ]


SIZES = {
    "tiny": Size(
        flags=(
            *_model(layers=16, hidden=48, ffn=128, heads=2, sequence=64, batch=4),
            *("--distributed-backend", "gloo"),
        ),
        runner=("--cpu",),
        iterations=150,
        learning_rates=(3e-3, 3e-2, 1e-1),
        jobs=2,
        budget=None,
    ),
    "single_gpu": Size(
        flags=(*_model(layers=48, hidden=128, ffn=344, heads=4, sequence=256, batch=16), "--bf16"),
        runner=(),
        iterations=200,
        learning_rates=(3e-3, 1e-2, 3e-2),
        jobs=9,
        budget=270,
    ),
}
SAME_FLAGS = [*COMMON, *plans.LOCAL, "--init-method-std", "0.06", "--split", "95,5,0"]
SAME_FLAGS += ["--vocab-size", "257", "--log-interval", "10", "--num-workers", "0"]
SAME_FLAGS += ["--eval-iters", "0", "--eval-interval", "1000000"]


def arguments(size: Size, model: str, iterations: int, data: Path, folder: Path) -> list[str]:
    """What follows `python -m megatron_mhc.run`, but for rate, seed and --load."""
    every = str(max(1, iterations // 20))
    metrics = ["--mhc-log-interval", every] if MODELS[model] else []
    return [
        *(*size.runner, str(MAIN), *SAME_FLAGS, *size.flags, "--data-path", str(data)),
        *("--data-cache-path", str(folder / "cache"), "--save", str(folder / "checkpoints")),
        *("--tensorboard-dir", str(folder / "tensorboard"), "--train-iters", str(iterations)),
        *("--lr-warmup-iters", every, *MODELS[model], *metrics),
    ]


def planned(args: argparse.Namespace, size: Size, data: Path, more: list[str]) -> Iterator[Run]:
    """Every run, so that what is done first compares most: all models at a rate, then the next."""
    iterations = args.iterations or size.iterations
    for seed in args.seeds or [1234]:
        for rate in args.learning_rates or size.learning_rates:
            for model in args.models or MODELS:
                folder = args.runs / args.size / f"{model}-lr{rate:g}-seed{seed}"
                own = ["--lr", str(rate), "--min-lr", str(rate / 10), "--seed", str(seed)]
                command = [*arguments(size, model, iterations, data, folder), *own, *more]
                yield Run(folder, {"model": model, "learning_rate": rate, "seed": seed}, command)


def without_plan(args: argparse.Namespace, more: list[str], start: float) -> bool:
    """All models at all rates and seeds, some at a time on one device."""
    size = SIZES[args.size]
    budget = size.budget if args.budget is None else args.budget
    data = args.runs / "data" / "stdlib"
    subprocess.run([sys.executable, DATA, "--output", data], cwd=ROOT, check=True)
    # compiling would take every process longer than its training
    slot = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    runs = list(planned(args, size, data, more))
    end = Budget() if budget is None else Budget(start + budget)
    return Schedule(runs, [slot] * (args.jobs or size.jobs), end).train()


def prepare_text(args: argparse.Namespace, size: plans.Size, kept: Path) -> Path:
    """Make the text, the same as that of the curves that there are; returns its folder."""
    data = args.runs / "data" / args.size
    command = [
        sys.executable,
        EXAMPLE / "prepare_text.py",
        "--output",
        data,
        "--vocab-size",
        str(size.vocab_size),
    ]
    if size.megabytes is not None:
        command += ["--megabytes", str(size.megabytes)]
    if args.roots:
        command += ["--roots", *args.roots]
    if file := next(kept.rglob("*.json"), None):
        command += ["--digest", json.loads(file.read_text())["data"]["digest"]]
    if code := subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(code)
    return data


def with_plan(args: argparse.Namespace, more: list[str], start: float) -> bool:
    """The runs of a plan, one a GPU."""
    size = plans.SIZES[args.size]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        slots = places(args.gpus or 1, size.environment, size.fusing, visible)
    except ValueError as error:
        sys.exit(f"stability: {error}")
    folder = args.curves or (EXAMPLE if size.fusing else args.runs) / "curves"
    kept = folder.resolve() / args.size
    data = prepare_text(args, size, kept)
    swept = Study([Result(one) for one in curves.load(kept)])
    best = swept.best_rates() | dict(args.rate or [])
    runs = runs_of(
        args.plan, size, tokens=args.tokens or size.tokens, rates=best,
        models=args.models, seeds=args.seeds, learning_rates=args.learning_rates,
        folder=args.runs / args.size, curves=kept, data=data, more=more,
    )  # fmt: skip
    budget = Budget(save=size.save, start=size.start)
    if args.budget is not None:
        budget = budget._replace(end=start + args.budget - size.save)
    report = 20 if size.fusing else 5
    return Schedule(runs, slots, budget, curves.keep, report, size.sequence).train()


def _pair(text: str) -> tuple[str, float]:
    model, _, rate = text.partition("=")
    try:
        pair = model, float(rate)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected MODEL=RATE") from None
    if model not in plans.COMPARED:
        raise argparse.ArgumentTypeError(f"{text!r}; models are {', '.join(plans.COMPARED)}")
    return pair


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The command line: our flags, and Megatron's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = "(default: the size's own)"
    add = parser.add_argument
    add("size", choices=list(dict.fromkeys([*SIZES, *plans.SIZES])), help="what is trained")
    add(
        "--runs", type=Path, default=ROOT / "runs" / "stability", metavar="FOLDER",
        help="where the data and a folder for each size are kept (default: %(default)s)",
    )  # fmt: skip
    add("--budget", type=float, metavar="SECONDS", help=f"of this piece {own}")
    add(
        "--models", nargs="+", choices=plans.MODELS, metavar="MODEL",
        help=f"which of {', '.join(plans.MODELS)} (default: all that there are to train)",
    )  # fmt: skip
    add(
        "--seeds", nargs="+", type=int, metavar="SEED",
        help="with a plan: of its seeds only these; without one: each trains all models at all"
        " rates (default: 1234)",
    )  # fmt: skip
    add(
        "--learning-rates", nargs="+", type=float, metavar="RATE",
        help=f"with a plan: of its peak rates only these; without one: all of them {own}",
    )  # fmt: skip
    plan = parser.add_argument_group("with a plan")
    plan.add_argument("--plan", choices=plans.PLANS)
    for name, kind, text in (
        ("--gpus", int, "runs at a time, one a GPU of CUDA_VISIBLE_DEVICES (default: 1)"),
        ("--tokens", int, f"of a whole run {own}"),
        ("--curves", Path, "a folder (default: curves/ of this example; on a CPU, of --runs)"),
    ):
        plan.add_argument(name, type=kind, help=text)
    plan.add_argument("--roots", type=Path, nargs="+", help="folders of packages to take text from")
    plan.add_argument(
        "--rate", type=_pair, action="append", metavar="MODEL=RATE",
        help="the best rate of a model (default: what the sweep's curves say)",
    )  # fmt: skip
    other = parser.add_argument_group("without one")
    other.add_argument("--jobs", type=int, help=f"runs at a time {own}")
    other.add_argument("--iterations", type=int, help=f"training steps of each run {own}")
    args, more = parser.parse_known_args()
    refuse(parser, args)
    args.runs = args.runs.resolve()
    return args, more


PLANNED = ("gpus", "tokens", "curves", "roots", "rate")
UNPLANNED = ("jobs", "iterations")


def refuse(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Say what does not go with a plan, or without one."""
    way = "with" if args.plan else "without"
    if args.size not in (plans.SIZES if args.plan else SIZES):
        what = "add --plan, or take" if args.size not in SIZES else "leave --plan out, or take"
        others = ", ".join(plans.SIZES if args.plan else SIZES)
        parser.error(f"{args.size} is not trained {way} a plan: {what} one of {others}")
    for name in UNPLANNED if args.plan else PLANNED:
        if getattr(args, name) is not None:
            change = "drop --plan" if args.plan else "add --plan NAME"
            parser.error(
                f"--{name.replace('_', '-')} means nothing {way} a plan: {change}, or drop the flag"
            )
    if not args.plan and not set(args.models or ()) <= set(MODELS):
        parser.error(f"--models without a plan are {', '.join(MODELS)}")


def main() -> None:
    """Reads the command line, prepares the data and trains."""
    start = time.monotonic()
    args, more = parse()
    train = with_plan if args.plan else without_plan
    if not train(args, more, start):
        sys.exit("stability: a run failed: the train.log that is named above says why")


if __name__ == "__main__":
    main()
