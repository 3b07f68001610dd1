"""Trains ordinary, HC and mHC models of one size, on the same data and seeds, at several rates.

    python examples/stability/run.py tiny                        # CPU, minutes
    python examples/stability/run.py single_gpu --budget 270     # a GPU, a piece of 270 seconds
    python examples/stability/run.py tiny --models mhc --seq-length 128   # more flags: Megatron's

A run is a process of its own, `--jobs` of them at a time: deep, narrow models leave most of a GPU
idle. Once the budget is spent, the runs save a checkpoint and stop; the same command goes on from
there, and starts no run that is finished. Then `report.py` prints the table and
`python -m megatron_mhc plot` draws.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAIN = ROOT / "examples" / "pretrain_gpt.py"
DATA = ROOT / "examples" / "prepare_data.py"
MODELS = {"ordinary": [], "hc": ["--mhc", "--mhc-variant", "hc"], "mhc": ["--mhc"]}
NOT_FINITE = re.compile(r"is not finite|found NaN|found Inf|NaN in local grad|Inf in local grad")
"""What the main script and Megatron say when a loss or a gradient is no number."""
SAVE_SECONDS = 60
"""How long a run that was told to stop may take to save."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of the study.

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

SAME_FLAGS = [
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu"),
    *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--init-method-std", "0.06"),
    *("--transformer-impl", "local", "--no-persist-layer-norm", "--no-masked-softmax-fusion"),
    *("--no-rope-fusion", "--no-gradient-accumulation-fusion", "--disable-jit-fuser"),
    *("--no-bias-swiglu-fusion", "--no-bias-dropout-fusion"),
    *("--split", "95,5,0", "--tokenizer-type", "NullTokenizer", "--vocab-size", "257"),
    *("--make-vocab-size-divisible-by", "8", "--no-create-attention-mask-in-dataloader"),
    *("--num-workers", "0", "--lr-decay-style", "cosine", "--weight-decay", "0.1"),
    *("--adam-beta2", "0.95", "--clip-grad", "1.0", "--log-interval", "10"),
    *("--eval-iters", "0", "--eval-interval", "1000000", "--tensorboard-log-interval", "1"),
    *("--save-interval", "1000000", "--ckpt-format", "torch_dist", "--exit-signal-handler"),
    *("--logging-level", "30"),
]


@dataclasses.dataclass(frozen=True)
class Run:
    """One model at one rate and seed, and the folder that holds all of it."""

    folder: Path
    model: str
    learning_rate: float
    seed: int

    @property
    def state(self) -> str:
        """finished, broke, stopped, failed or new."""
        file = self.folder / "run.json"
        return json.loads(file.read_text())["state"] if file.exists() else "new"

    def command(self, size: Size, iterations: int, data: Path, more: list[str]) -> list[str]:
        """Trains it, from its checkpoint if it has one."""
        checkpoints = self.folder / "checkpoints"
        resume = ["--load", str(checkpoints)] if checkpoints.is_dir() else []
        every = str(max(1, iterations // 20))
        metrics = ["--mhc-log-interval", every] if MODELS[self.model] else []
        return [
            *(sys.executable, "-m", "megatron_mhc.run", *size.runner, str(MAIN)),
            *(*SAME_FLAGS, *size.flags, "--data-path", str(data)),
            *("--data-cache-path", str(self.folder / "cache")),
            *("--tensorboard-dir", str(self.folder / "tensorboard")),
            *("--save", str(checkpoints), *resume, "--train-iters", str(iterations)),
            *("--lr-warmup-iters", str(max(1, iterations // 20))),
            *("--lr", str(self.learning_rate), "--min-lr", str(self.learning_rate / 10)),
            *("--seed", str(self.seed), *MODELS[self.model], *metrics, *more),
        ]

    def close(self, code: int, stopped: bool, seconds: float, command: list[str]) -> str:
        """Note what became of it; what is finished needs no checkpoint any more."""
        log = (self.folder / "train.log").read_text(errors="replace")
        if code == 0:
            state = (
                "stopped" if stopped and "exiting program after receiving" in log else "finished"
            )
        elif stopped:
            state = "stopped"
        else:
            state = "broke" if NOT_FINITE.search(log) else "failed"
        if state in ("finished", "broke"):
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        described = {"model": self.model, "learning_rate": self.learning_rate, "seed": self.seed}
        described |= {"state": state, "exit_code": code, "seconds": round(seconds, 1)}
        text = json.dumps({**described, "command": command}, indent=2)
        (self.folder / "run.json").write_text(text + "\n")
        return state


def planned(folder: Path, models: list[str], rates: list[float], seeds: list[int]) -> Iterator[Run]:
    """Every run, so that what is done first compares most: all models at a rate, then the next."""
    for seed in seeds:
        for rate in rates:
            for model in models:
                yield Run(folder / f"{model}-lr{rate:g}-seed{seed}", model, rate, seed)


def train(
    runs: list[Run], size: Size, iterations: int, data: Path, more: list[str], jobs: int, end: float
) -> bool:
    """Train what is not finished, `jobs` at a time, until time.monotonic() is `end`.

    Returns:
        Whether no run failed (to break is no failure here: it is what the study looks for).
    """
    waiting = [run for run in runs if run.state not in ("finished", "broke")]
    running: dict[subprocess.Popen[bytes], tuple[Run, float, list[str]]] = {}
    # compiling would take every process longer than its training
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    good, stopped = True, False
    try:
        while running or (waiting and not stopped):
            while waiting and len(running) < jobs and not stopped:
                run = waiting.pop(0)
                run.folder.mkdir(parents=True, exist_ok=True)
                command = run.command(size, iterations, data, more)
                with (run.folder / "train.log").open("wb") as log:
                    started = subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                    )
                running[started] = (run, time.monotonic(), command)
            time.sleep(0.2)
            if not stopped and time.monotonic() > end:
                stopped = True
                for process in running:
                    process.terminate()
            if stopped and time.monotonic() > end + SAVE_SECONDS:
                for process in running:
                    process.kill()
            for process in [p for p in running if p.poll() is not None]:
                run, start, command = running.pop(process)
                seconds = time.monotonic() - start
                state = run.close(process.returncode, stopped, seconds, command)
                print(f"stability: {run.folder.name}: {state} in {seconds:.0f} s", flush=True)
                if state == "failed":
                    good = False
                    lines = (run.folder / "train.log").read_text(errors="replace").splitlines()
                    print("\n".join(lines[-15:]), file=sys.stderr, flush=True)
    finally:
        for process in running:
            process.kill()
    left = [run for run in runs if run.state not in ("finished", "broke")]
    print(f"stability: {len(runs) - len(left)} of {len(runs)} runs are done", flush=True)
    return good


def main() -> None:
    """Reads the command line, prepares the data and trains."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = "(default: the size's own)"
    parser.add_argument(
        "size", choices=SIZES, help="model, batch, device, and what the flags below default to"
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "stability", metavar="FOLDER",
        help="where the data and a folder for each size are kept (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--budget", type=float, help=f"seconds of this piece {own}")
    parser.add_argument("--jobs", type=int, help=f"runs at a time {own}")
    parser.add_argument("--iterations", type=int, help=f"training steps of each run {own}")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="which (default: all)"
    )
    parser.add_argument(
        "--learning-rates", nargs="+", type=float, metavar="RATE", help=f"peak rates {own}"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1234], metavar="SEED",
        help="each trains all models at all rates (default: 1234)",
    )  # fmt: skip
    args, more = parser.parse_known_args()
    size = SIZES[args.size]
    budget = size.budget if args.budget is None else args.budget
    rates = args.learning_rates or list(size.learning_rates)
    folder = args.runs.resolve() / args.size
    data = args.runs.resolve() / "data" / "stdlib"
    subprocess.run([sys.executable, DATA, "--output", data], cwd=ROOT, check=True)
    runs = list(planned(folder, args.models, rates, args.seeds))
    end = float("inf") if budget is None else start + budget
    iterations, jobs = args.iterations or size.iterations, args.jobs or size.jobs
    if not train(runs, size, iterations, data, more, jobs, end):
        sys.exit("stability: a run failed; its train.log says why")


if __name__ == "__main__":
    main()
