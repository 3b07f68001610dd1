"""Which of Megatron's CUDA graphs work with mHC, which refuses those that do not.

    python benchmarks/cuda_graphs.py --out runs/cuda_graphs        # one GPU, Transformer Engine

Trains the same small model 20 steps under each of Megatron's implementations, ordinary and with mHC
(the refusals left out), and prints a table: whether it ran, whether its losses are those without
graphs, and the median step. The ordinary model's rows tell mHC's faults from Megatron's.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = """
    --num-layers 8 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16
    --seq-length 1024 --max-position-embeddings 1024 --vocab-size 8191
    --micro-batch-size 4 --global-batch-size 8
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --mock-data --tokenizer-type NullTokenizer --num-workers 0 --eval-iters 0 --eval-interval 1000
    --log-interval 1 --lr 1e-3 --clip-grad 1.0 --no-gradient-accumulation-fusion --seed 7
    --no-create-attention-mask-in-dataloader --no-check-for-nan-in-loss-and-grad
    --bf16 --transformer-impl transformer_engine --te-rng-tracker --train-iters 20
"""
IMPLEMENTATIONS = ("none", "full_iteration", "local", "transformer_engine")
MODELS = ["ordinary", "mHC"]
ALLOWED = ("none", "full_iteration")
WITHOUT_REFUSAL = """
import sys
from megatron_mhc import run
from megatron_mhc.model import compatibility
refused = [c for c in compatibility.CONFLICTS if not c.flag.startswith("--cuda-graph")]
compatibility.CONFLICTS = tuple(refused)
run.main(sys.argv[1:])
"""


def train(out: Path, model: str, implementation: str, limit: float) -> tuple[list[str], float, str]:
    """A training run: its losses, its median step in ms after the tenth, and why it failed."""
    mhc = ["--mhc", "--mhc-backend", "triton"] if model == "mHC" else []
    log = out / f"{model}-{implementation}.log"
    environment = {**os.environ, "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    with log.open("w") as file:
        try:
            code = subprocess.run(
                [
                    *(sys.executable, "-c", WITHOUT_REFUSAL, "examples/pretrain_gpt.py"),
                    *(*FLAGS.split(), "--cuda-graph-impl", implementation, *mhc),
                ],
                cwd=ROOT,
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
        errors = re.findall(r"\w*(?:Error|Exception): .+", text)
        failure += f": {errors[-1][:150]}" if errors else ""
    losses = re.findall(r"iteration +\d+/.*?lm loss: (\S+)", text)
    steps = [float(t) for t in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", text)]
    return losses, statistics.median(steps[10:]) if len(steps) > 10 else 0.0, failure


def main() -> int:
    """Run all and print the table; the exit status counts failures of what mHC allows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/cuda_graphs"), help="logs and table")
    parser.add_argument("--each", type=float, default=75, help="seconds a run may take")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table, failures = [f"{'model':10}{'implementation':20}{'step ms':>9}  outcome"], 0
    for model in options.models:
        plain: list[str] = []
        for implementation in IMPLEMENTATIONS:
            losses, step, outcome = train(options.out, model, implementation, options.each)
            if not outcome and not losses:
                outcome = "no losses in its log"
            if implementation == IMPLEMENTATIONS[0] and not outcome:
                plain = losses
            if not outcome and not plain:
                outcome = "nothing to compare with: the run without graphs failed"
            if not outcome:
                pairs = list(zip(losses, plain, strict=True)) if len(losses) == len(plain) else []
                worst = max((abs(float(a) / float(b) - 1) for a, b in pairs), default=float("inf"))
                outcome = "the losses without graphs, digit for digit"
                if losses != plain:
                    outcome = f"DIFFERS: losses within {worst:.1e} of those without graphs"
                    failures += model == "mHC" and implementation in ALLOWED
            else:
                failures += model == "mHC" and implementation in ALLOWED
                outcome = f"FAILED ({outcome})"
            table.append(f"{model:10}{implementation:20}{step:9.1f}  {outcome}")
            print(table[-1], flush=True)
    name = "-".join(["table", *([] if options.models == MODELS else options.models)])
    (options.out / f"{name}.txt").write_text("\n".join(table) + "\n")
    return failures


if __name__ == "__main__":
    sys.exit(main())
