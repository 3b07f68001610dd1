"""Megatron's CUDA graphs with mHC: do they run, are their losses those without graphs, how fast.

    python benchmarks/model/cuda_graphs.py --out runs/cuda_graphs    # one GPU, Transformer Engine

Trains small models 20 steps under each of Megatron's implementations, ordinary and with mHC, each
in a process of its own, several at a time. A row says whether it ran and whether its 20 losses and
gradient norms are those of the same model without graphs. Fused sites round once less, so a run
with graphs is compared with one that fuses the same sites (`across`, `inside`: whether sites are
fused across layers and inside one). The ordinary model's rows tell mHC's faults from Megatron's.

One row is a trap that has to be seen: sites fused across the end of a graph train on values of the
step that was captured.
"""

import argparse
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import command_line, pretrain

FLAGS = f"""
    {pretrain.FLAGS}
    --num-layers 8 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16
    --seq-length 1024 --max-position-embeddings 1024 --vocab-size 8191
    --micro-batch-size 4 --global-batch-size 8
    --lr 1e-3 --clip-grad 1.0
    --no-create-attention-mask-in-dataloader --no-check-for-nan-in-loss-and-grad
    --bf16 --transformer-impl transformer_engine --te-rng-tracker --train-iters 20
"""
MODELS = {
    "dense": "",
    "experts": "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 704"
    " --moe-grouped-gemm --moe-token-dispatcher-type alltoall"
    " --moe-router-load-balancing-type none --moe-shared-expert-intermediate-size 704",
    "prediction": "--mtp-num-layers 1",
    "recompute": "",
}
MHC = {"recompute": "--mhc-recompute auto --mhc-log-interval 5"}
"""Flags of mHC alone, of a model."""
GRAPHS = {
    "none": "",
    "full_iteration": "--cuda-graph-impl full_iteration",
    "local": "--cuda-graph-impl local",
    "te": "--cuda-graph-impl transformer_engine",
    "te attn": "--cuda-graph-impl transformer_engine --cuda-graph-modules attn",
    "te router": "--cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router",
    "te preprocess": "--cuda-graph-impl transformer_engine"
    " --cuda-graph-modules attn moe_router moe_preprocess",
}
OF_MODEL = {
    "dense": ("none", "full_iteration", "local", "te", "te attn"),
    "experts": ("none", "te attn", "te router", "te preprocess"),
    "prediction": ("none", "te", "te attn"),
    "recompute": ("none", "te attn"),
}
# which sites a graph's end lets fuse: (inside a layer, across layers)
FUSED = dict.fromkeys(("none", "full_iteration", "te attn"), (True, True))
RUN = """
import sys
from megatron_mhc import run
inside, across = (word == "True" for word in sys.argv[1:3])
from megatron_mhc.model import layer
layer.is_one_region = lambda *_: inside
layer.runs_on_into_the_next = lambda *_: across
run.main(sys.argv[3:])
"""


@dataclass(frozen=True)
class Case:
    """A training run: which model, with mHC or without, which graphs, which sites are fused."""

    model: str
    mhc: bool
    graphs: str
    inside: bool = True
    across: bool = True

    @property
    def name(self) -> str:
        """For a log file and a row."""
        fused = f"{'inside' if self.inside else ''}{' across' if self.across else ''}"
        parts = (self.model, "mHC" if self.mhc else "ordinary", self.graphs, fused)
        return "-".join(parts if self.mhc else parts[:3]).replace(" ", "-")

    @property
    def plain(self) -> "Case":
        """The run without graphs that this one is compared with."""
        return Case(self.model, self.mhc, "none", self.inside, self.across)


@dataclass(frozen=True)
class Result:
    """What a run logged: (loss, gradient norm) a step, its median step in ms, why it failed."""

    steps: tuple[tuple[str, str], ...]
    ms: float
    failure: str


def cases(models: list[str]) -> list[Case]:
    """Every run, those without graphs first."""
    found: dict[Case, None] = {}
    for model in models:
        for graphs in OF_MODEL[model]:
            fused = FUSED.get(graphs, (True, False))
            for case in (Case(model, True, graphs, *fused), Case(model, False, graphs)):
                found |= {case.plain: None, case: None}
    if "dense" in models:
        found[Case("dense", True, "te")] = None  # the trap
    return sorted(found, key=lambda case: case.graphs != "none")


def train(out: Path, case: Case, limit: float) -> Result:
    """Train one of them."""
    flags = [*FLAGS.split(), *MODELS[case.model].split(), *GRAPHS[case.graphs].split()]
    if case.mhc:
        flags += ["--mhc", "--mhc-backend", "triton", *MHC.get(case.model, "").split()]
    log = out / f"{case.name}.log"
    environment = {**os.environ, "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    command = [sys.executable, "-c", RUN, str(case.inside), str(case.across)]
    with log.open("w") as file:
        try:
            code = subprocess.run(
                [*command, pretrain.SCRIPT, *flags],
                cwd=pretrain.ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit,
            ).returncode
            failure = f"exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            failure = f"more than {limit:.0f} s"
    text = log.read_text(errors="replace")
    if failure:
        errors = pretrain.errors(text)
        failure += f": {errors[-1][:150]}" if errors else ""
    times = pretrain.step_times(text)
    median = statistics.median(times[10:]) if len(times) > 10 else 0.0
    return Result(tuple(pretrain.steps(text)), median, failure)


def outcome(result: Result, plain: Result) -> tuple[str, bool]:
    """A row's last words, and whether the digits are those without graphs."""
    if result.failure:
        return f"FAILED ({result.failure})", False
    if not result.steps or not plain.steps:
        return "nothing to compare with: no losses in a log", False
    if result.steps == plain.steps:
        return "losses and gradient norms without graphs, digit for digit", True
    first = next(
        (i for i, (a, b) in enumerate(zip(result.steps, plain.steps, strict=False), 1) if a != b),
        min(len(result.steps), len(plain.steps)) + 1,
    )
    return f"DIFFERS from step {first} on: last loss {result.steps[-1][0]}", False


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/cuda_graphs"), help="logs and table")
    parser.add_argument("--each", type=float, default=200, help="seconds a run may take")
    parser.add_argument(
        "--at-once", type=int, default=5, help="runs that share the GPU (not for time)"
    )
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=MODELS, help="these alone"
    )
    return parser.parse_args()


def main() -> int:
    """Run all and print the table; the exit status counts rows of mHC that are not as said."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = cases(options.models)
    with ThreadPoolExecutor(options.at_once) as pool:
        done = pool.map(lambda case: train(options.out, case, options.each), chosen)
        results = dict(zip(chosen, done, strict=True))
    table, failures = [f"{'run':44}{'step ms':>9}  outcome"], 0
    for case in chosen:
        result = results[case]
        words, same = outcome(result, results.get(case.plain, result))
        is_trap = case.across and case.graphs == "te"
        if case.mhc and is_trap:
            words += "  (a trap: it must not be the same)"
            failures += same
        else:
            failures += case.mhc and not same
        table.append(f"{case.name:44}{result.ms:9.1f}  {words}")
    text = "\n".join(table)
    (options.out / "table.txt").write_text(text + "\n")
    print(text)
    return failures


if __name__ == "__main__":
    sys.exit(main())
