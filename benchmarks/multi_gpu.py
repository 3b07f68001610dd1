"""Training runs on several GPUs of one host, through `examples/pretrain_gpt.py`, and a table.

    benchmarks/multi_gpu.sh --out runs/multi_gpu

`--ranks-per-gpu 4` gives every GPU several ranks, each a host of its own to NCCL, which then goes
over sockets: on one GPU it shows what four stages do over NCCL, and nothing about time.

Each run is a launch of its own with a time limit: one that fails is a line in the table and does
not stop the others. What is timed runs last and alone, the rest `--jobs` launches at a time:

* pipeline: losses of all GPUs as stages (at most 4, data parallel beyond) against one GPU; stock
  order, overlap and overlap with 2 in flight against each other, digit for digit (losses and
  gradient norms), also with timers on, and with late outputs (`late_ends.py`);
* MoE over expert parallel ranks, TP with sequence parallelism, CP: losses against one GPU;
* the paper's layers (MLA, mixture of experts, distributed optimizer with both overlaps), pipeline
  and expert parallel: recompute and overlap against stock order, digit for digit;
* save on several GPUs, resume on one, and back;
* step time of a larger model: ordinary, mHC, with overlap, with recompute, and with both;
  NCCL's send and receive kernels that no compute kernel runs beside, from Megatron's profiler.
"""

import argparse
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from spans import exposed

ROOT = Path(__file__).parents[1]
RUNNER = "megatron_mhc.run"
COMMON = """
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --mock-data --tokenizer-type NullTokenizer --num-workers 0 --eval-iters 0 --eval-interval 1000
    --log-interval 1 --lr 1e-4 --lr-decay-style constant --clip-grad 0 --seed 7
    --no-gradient-accumulation-fusion
    --ckpt-format torch_dist
"""
GPU = "--bf16 --transformer-impl transformer_engine"
CPU = """
    --transformer-impl local --distributed-backend gloo --disable-jit-fuser
    --no-masked-softmax-fusion --no-persist-layer-norm --no-bias-swiglu-fusion
    --no-bias-dropout-fusion --no-rope-fusion
"""
SMALL = """
    --disable-jit-fuser --num-layers 4 --hidden-size 1024 --ffn-hidden-size 2816
    --num-attention-heads 16
    --seq-length 1024 --max-position-embeddings 1024 --vocab-size 8191
    --micro-batch-size 1 --global-batch-size 8
"""
TINY = """
    --num-layers 8 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --seq-length 32 --max-position-embeddings 32 --vocab-size 127
    --micro-batch-size 1 --global-batch-size 16 --make-vocab-size-divisible-by 64
"""
LARGE = """
    --num-layers 8 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --seq-length 4096 --max-position-embeddings 4096
    --vocab-size 8191 --micro-batch-size 1 --global-batch-size 16
"""
PAPER = """
    --num-layers 8 --hidden-size 2560 --ffn-hidden-size 12288 --num-attention-heads 32
    --seq-length 4096 --max-position-embeddings 4096 --vocab-size 8191 --init-method-std 0.006
    --multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64
    --v-head-dim 128 --qk-layernorm --rope-type rope --no-rope-fusion
    --num-experts 10 --moe-layer-freq ([0]*1+[1]*7) --moe-ffn-hidden-size 1536 --moe-router-topk 6
    --moe-router-score-function sigmoid --moe-router-dtype fp32 --moe-router-enable-expert-bias
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4
    --moe-shared-expert-intermediate-size 3072 --moe-grouped-gemm --moe-permute-fusion
    --moe-token-dispatcher-type alltoall
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 1 --global-batch-size 8
"""
"""`examples/moe/cluster.sh`'s layers, fewer, and fewer experts."""
TINY_PAPER = """
    --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 32 --kv-lora-rank 32
    --max-position-embeddings 32 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16
    --moe-ffn-hidden-size 96 --moe-shared-expert-intermediate-size 96 --vocab-size 127
    --make-vocab-size-divisible-by 64 --num-experts 4 --moe-router-topk 2
"""
MOE = "--num-experts 8 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"
OVERLAP = "--mhc --mhc-overlap-p2p"
Part = tuple[list[Callable[[], Any]], list[Callable[[], Any]]]
"""Launches, which may run side by side, and checks of what came of them."""


def apart(loss: str, other: str) -> float:
    """How far a printed loss is from another, relatively; infinitely, if one is no number."""
    distance = abs(float(loss) / float(other) - 1)
    return distance if math.isfinite(distance) else math.inf


@dataclass
class Run:
    """A launch and what came of it."""

    name: str
    gpus: int
    seconds: float = 0.0
    failure: str = ""
    losses: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    step_ms: float = 0.0
    peak_gib: float = 0.0
    trace: Path | None = None
    remark: str = ""


class Bench:
    """Launches runs, one after the other or side by side, and keeps what came of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cpu: bool = options.cpu
        self.out: Path = options.out.resolve()
        self.begin = time.time()
        self.runs: dict[str, Run] = {}
        self.reserved = 0.0

    def left(self) -> float:
        """Seconds of the whole call's limit that are left, but for those reserved for later."""
        return self.options.limit - self.reserved - (time.time() - self.begin)

    def side_by_side(self, launches: list[Callable[[], Any]]) -> None:
        """Run these, `--jobs` at a time; one that raises is a failure in the table."""
        with ThreadPoolExecutor(self.options.jobs) as pool:
            for index, result in enumerate([pool.submit(launch) for launch in launches]):
                error = result.exception()
                if error is not None:
                    self.runs[f"launch {index}"] = Run(f"launch {index}", 0, failure=repr(error))

    def start(
        self,
        name: str,
        gpus: int,
        flags: str,
        iterations: int,
        first: int = 0,
        script: str = "examples/pretrain_gpt.py",
        **environment: str,
    ) -> tuple[Run, Any]:
        """Start a launch on GPUs first, first + 1, ..."""
        folder = self.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shared = self.options.ranks_per_gpu > 1
        runner = ["--no-python", "benchmarks/shared_gpu.sh"] if shared else ["-m", RUNNER]
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(gpus), *runner),
            *(["--cpu"] if self.cpu else []),
            script,
            *COMMON.split(),
            *(CPU if self.cpu else GPU).split(),
            *flags.split(),
            *("--train-iters", str(iterations), "--tensorboard-dir", str(folder / "tensorboard")),
        ]
        cards = -(-gpus // self.options.ranks_per_gpu)
        visible = ",".join(str((0 if shared else first) + index) for index in range(cards))
        extra = {"CUDA_VISIBLE_DEVICES": "" if self.cpu else visible, **environment}
        if self.cpu:
            extra |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
        log = (folder / "log").open("w")
        print(f"== {name}: {' '.join(flags.split())}", file=log, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **extra}, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self.runs[name] = Run(name, gpus)
        return self.runs[name], process

    def finish(self, run: Run, process: Any) -> Run:
        """Wait for a launch, within its limit and the whole call's, and read what it printed."""
        begin = time.time()
        limit = max(5.0, min(self.options.each, self.left()))
        try:
            code = process.wait(limit)
            run.failure = f"exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            # its ranks are sessions of their own: the launcher ends them, if it is asked politely
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            run.failure = f"more than {limit:.0f} s"
        run.seconds = time.time() - begin
        text = (self.out / run.name / "log").read_text(errors="replace")
        run.losses = re.findall(r"iteration +\d+/.*?lm loss: (\S+)", text)
        run.norms = re.findall(r"grad norm: (\S+)", text)
        times = [float(t) for t in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", text)]
        run.step_ms = statistics.median(times[3:]) if len(times) > 3 else 0.0
        peaks = re.findall(r"mem-max-allocated-gigabytes: ([\d.]+)|max allocated: ([\d.]+)", text)
        run.peak_gib = max((float(a or float(b) / 1024) for a, b in peaks), default=0.0)
        traces = sorted((self.out / run.name).rglob("*.json*"))
        run.trace = traces[0] if traces else None
        if run.failure:
            errors = re.findall(r"\w*(?:Error|Exception): .+", text)
            run.remark = next((e for e in errors if not e.startswith("ChildFailed")), "")[:200]
        print(f"{run.name}: {run.seconds:.0f} s {run.failure} {run.remark}", flush=True)
        return run

    def train(
        self, name: str, gpus: int, flags: str, iterations: int, first: int = 0, **more: str
    ) -> Run | None:
        """Start and finish, unless the call's time is up."""
        if self.left() < 15:
            self.runs[name] = Run(name, gpus, failure="not run: no time left")
            return None
        return self.finish(*self.start(name, gpus, flags, iterations, first, **more))

    def alike(self, one: str, other: str, bound: float | None) -> None:
        """Compare losses: with gradient norms digit for digit where bound is None, else relatively.

        The other may have gone on for longer.
        """
        if one not in self.runs or other not in self.runs:
            return  # its launch raised, which is a line of its own
        a, b = self.runs[one], self.runs[other]
        steps = len(a.losses)
        if a.failure or b.failure or not steps or steps > len(b.losses):
            a.remark = a.remark or f"not comparable with {other}"
            return
        losses = b.losses[:steps]
        if a.losses == losses and (a.norms == b.norms[:steps] or bound is not None):
            what = "losses and gradient norms" if bound is None else "losses"
            a.remark = f"{steps} {what} as {other}'s, digit for digit"
            return
        worst = max(map(apart, a.losses, losses))
        a.remark = f"losses within {worst:.1e} of {other}'s"
        if bound is None or worst > bound:
            a.failure = "differs"


def save_start(bench: Bench, name: str, flags: str) -> None:
    """Save the weights that `starting` gives to runs of these flags."""
    folder = bench.out / f"weights-{name}"
    # of another call these would be another model's
    shutil.rmtree(folder, ignore_errors=True)
    bench.train(f"weights-{name}", 1, f"{flags} --save {folder} --save-interval 1", 1)


def starting(bench: Bench, name: str, flags: str) -> str:
    """Flags that start a run from weights which one GPU saved, whatever the run is split into.

    Megatron draws a stage's weights by the stage's own seed: without this no losses would agree.
    """
    return (
        f"{flags} --load {bench.out / f'weights-{name}'} --finetune --no-load-optim --no-load-rng"
    )


def pipelines(bench: Bench, gpus: int, size: str) -> Part:
    """Losses of a pipeline against one GPU, and of the orders against each other."""
    size = starting(bench, "dense", f"{size} --mhc")
    stages = f"--pipeline-model-parallel-size {min(gpus, 4)}"
    steps = 5 if bench.cpu else bench.options.steps
    virtual = f"{stages} --num-layers-per-virtual-pipeline-stage 1"
    few = min(steps, 20)
    timers = "--timing-log-level 2"  # the host waits for the device at every message
    runs = {
        "pp": (f"{stages} --mhc", steps),
        "pp-overlap": (f"{stages} {OVERLAP}", steps),
        "pp-overlap-2": (f"{stages} {OVERLAP} --mhc-overlap-in-flight 2", steps),
        "vpp": (f"{virtual} --mhc", steps),
        "vpp-overlap": (f"{virtual} {OVERLAP}", steps),
        "vpp-sharded": (f"{virtual} --mhc --use-distributed-optimizer", few),
        "pp-timers": (f"{stages} {OVERLAP} {timers}", few),
        "vpp-timers": (f"{virtual} {OVERLAP} {timers}", few),
        "pp-late": (f"{stages} {OVERLAP}", few),
        "vpp-late": (f"{virtual} {OVERLAP}", few),
    }
    # all streams of a GPU in one queue, as tensor parallelism wants it there
    queue = {"pp-queue": "pp-overlap", "pp-queue-2": "pp-overlap-2", "vpp-queue": "vpp-overlap"}
    runs |= {name: (runs[like][0], few) for name, like in queue.items()}
    if bench.cpu:  # nothing sleeps there
        del runs["pp-late"], runs["vpp-late"]
    launches = [
        partial(bench.train, "one", 1, size, steps),
        partial(bench.train, "one-again", 1, size, few, first=1),
    ]
    for name, (flags, count) in runs.items():
        more = {"script": "benchmarks/late_ends.py"} if name.endswith("late") else {}
        if name in queue:
            more["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        launches.append(partial(bench.train, name, gpus, f"{size} {flags}", count, **more))
    checks = [
        partial(bench.alike, "one-again", "one", None),
        partial(bench.alike, "pp", "one", 1e-2),
        partial(bench.alike, "vpp", "one", 1e-2),
        *(
            partial(bench.alike, name, name.split("-")[0], 1e-2 if "sharded" in name else None)
            for name in runs
            if name not in ("pp", "vpp")
        ),
    ]
    return launches, checks


TIMED = {
    "time-mhc": "--mhc",
    "time-overlap": OVERLAP,
    "time-ordinary": "",
    "time-overlap-2": f"{OVERLAP} --mhc-overlap-in-flight 2",
    "time-overlap-recompute": f"{OVERLAP} --mhc-recompute auto",
    "time-recompute": "--mhc --mhc-recompute auto",
}


def step_times(bench: Bench, gpus: int, size: str, names: list[str]) -> None:
    """A larger model's steps: in stock order, with overlap, with recompute, and with both."""
    stages = f"--pipeline-model-parallel-size {min(gpus, 4)} --log-memory-interval 5"
    profiler = "" if bench.cpu else (
        "--profile --use-pytorch-profiler --profile-step-start 10 --profile-step-end 11"
        " --profile-ranks 0"
    )  # fmt: skip
    for name in names:
        flags = f"{size} {stages} {profiler} {TIMED[name]}"
        run = bench.train(name, gpus, flags, 5 if bench.cpu else 12)
        if run is not None and run.trace is not None:
            run.remark += ", ".join(f"{k} {v:.1f}" for k, v in exposed(run.trace).items())


def other_parallelism(bench: Bench, gpus: int, size: str) -> Part:
    """MoE over expert parallel ranks, TP with sequence parallelism, CP."""
    steps = 5 if bench.cpu else 20
    moe = starting(bench, "moe", f"{size} {MOE} --mhc")
    dense = starting(bench, "dense", f"{size} --mhc")
    one_queue = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    tensor = f"{dense} --tensor-model-parallel-size 2 --sequence-parallel"
    launches = [
        partial(bench.train, "moe-one", 1, moe, steps),
        partial(bench.train, "dense-one", 1, dense, steps, first=1),
        partial(bench.train, "moe-ep", gpus, f"{moe} --expert-model-parallel-size {gpus}", steps),
        partial(bench.train, "tp-sp", 2, tensor, steps, **one_queue),
    ]
    checks = [
        partial(bench.alike, "moe-ep", "moe-one", 2e-2),
        partial(bench.alike, "tp-sp", "dense-one", 2e-2),
    ]
    if not bench.cpu:
        context = f"{dense} --context-parallel-size 2"
        launches.append(partial(bench.train, "cp", 2, context, steps, **one_queue))
        checks.append(partial(bench.alike, "cp", "dense-one", 2e-2))
    return launches, checks


def paper(bench: Bench, gpus: int, _: str) -> Part:
    """The paper's layers: what changes nothing but the order of work changes no digit."""
    size = PAPER + (TINY_PAPER if bench.cpu else "")
    if gpus >= 2:
        size += " --pipeline-model-parallel-size 2"
    if gpus >= 4:
        size += " --expert-model-parallel-size 2"
    runs = {
        "paper-ordinary": "",
        "paper": "--mhc",
        "paper-again": "--mhc",
        "paper-recompute": "--mhc --mhc-recompute auto",
        "paper-recompute-1": "--mhc --mhc-recompute 1",
        # attention's backward adds in any order: what that alone does to the losses
        "paper-free": "--mhc",
        "paper-free-again": "--mhc",
        "paper-free-recompute": "--mhc --mhc-recompute auto",
    }
    if gpus >= 2:
        runs |= {
            "paper-overlap": OVERLAP,
            "paper-overlap-recompute": f"{OVERLAP} --mhc-recompute auto",
        }
    steps = 5 if bench.cpu else min(bench.options.steps, 20)
    free = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"}
    launches = [
        partial(
            bench.train, name, gpus, f"{size} {flags}", steps, **(free if "free" in name else {})
        )
        for name, flags in runs.items()
    ]
    exact = [
        name for name in runs if "free" not in name and name not in ("paper", "paper-ordinary")
    ]
    checks = [partial(bench.alike, name, "paper", None) for name in exact]
    # ten times apart is no bound: these lines are there for their distance
    checks += [partial(bench.alike, name, "paper", 10) for name in runs if "free" in name]
    return launches, checks


def resume(bench: Bench, gpus: int, size: str) -> Part:
    """Save on several GPUs, go on with one, and back on several."""
    stages = f"--pipeline-model-parallel-size {min(gpus, 4)} {OVERLAP}"
    folder, steps = bench.out / "checkpoints", 3 if bench.cpu else 10
    shutil.rmtree(folder, ignore_errors=True)
    both = f"{size} --save {folder} --save-interval {steps} --override-opt-param-scheduler"
    whole = f"{both} {stages}".replace(str(folder), f"{folder}-0")

    def one_after_the_other() -> None:
        bench.train("save", gpus, f"{both} {stages}", steps)
        bench.train("resume-on-one", 1, f"{both} --load {folder} --mhc", 2 * steps)
        bench.train("back", gpus, f"{both} --load {folder} {stages}", 3 * steps)

    def compare() -> None:
        runs = [bench.runs[name] for name in ("whole", "save", "resume-on-one", "back")]
        for kept in (folder, Path(f"{folder}-0")):
            shutil.rmtree(kept, ignore_errors=True)
        if any(run.failure for run in runs):
            return
        for index, run in enumerate(runs[1:]):
            same = runs[0].losses[index * steps : (index + 1) * steps]
            if len(run.losses) != len(same):
                run.failure = f"{len(run.losses)} losses, expected {len(same)}"
                continue
            pairs = list(zip(run.losses, same, strict=True))
            if index > 0:
                # Megatron's second line after a resume is the mean of the first two losses
                del pairs[1]
            worst = max(apart(a, b) for a, b in pairs)
            run.remark = f"losses within {worst:.1e} of an uninterrupted run's"
            run.failure = "differs" if worst > 1e-2 else ""

    return [one_after_the_other, partial(bench.train, "whole", gpus, whole, 3 * steps)], [compare]


CORRECT = {
    "pipelines": pipelines,
    "other_parallelism": other_parallelism,
    "paper": paper,
    "resume": resume,
}
"""Parts whose launches may run side by side: nothing in them is timed."""
PARTS = (*CORRECT, "step_times")


def main() -> int:
    """Run the parts, print the table; the number of failures is the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/multi_gpu"), help="logs and table")
    parser.add_argument("--cpu", action="store_true", help="rehearse on CPU processes, tiny")
    parser.add_argument("--gpus", type=int, help="how many to use (default: all)")
    parser.add_argument("--ranks-per-gpu", type=int, default=1, help="share each GPU (no times)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--steps", type=int, default=100, help="of a pipeline's longer runs")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="these runs of the parts")
    parser.add_argument("--jobs", type=int, default=4, help="launches at a time, where not timed")
    parser.add_argument("--each", type=float, default=240, help="seconds a run may take")
    parser.add_argument("--limit", type=float, default=560, help="seconds the call may take")
    parser.add_argument("--timing", type=float, default=230, help="of them kept for step times")
    options = parser.parse_args()
    bench = Bench(options)
    if options.cpu:
        gpus = options.gpus or 2
    else:
        import torch

        gpus = options.gpus or torch.cuda.device_count() * options.ranks_per_gpu
    if gpus < 2 and options.parts != ["paper"]:
        sys.exit(f"multi_gpu.py: there is {gpus} GPU here and this needs 2; --cpu rehearses")
    small, large = (TINY, TINY) if options.cpu else (SMALL, LARGE)
    if gpus > 2:  # two virtual stages each
        small = small.replace("--num-layers 4", f"--num-layers {2 * min(gpus, 4)}")
    correct = [CORRECT[name](bench, gpus, small) for name in options.parts if name in CORRECT]
    if options.only:
        if "resume" in options.parts:
            parser.error("--only does not go with --parts resume")
        # each launch is a partial of `train`, whose first argument is the run's name
        known = {launch.args[0] for launches, _ in correct for launch in launches}
        known |= {*TIMED} if "step_times" in options.parts else set()
        if unknown := {*options.only} - known:
            parser.error(f"--only: no {', '.join(unknown)} among {', '.join(sorted(known))}")
    launches = [launch for launches, _ in correct for launch in launches]
    if options.only:
        launches = [launch for launch in launches if launch.args[0] in options.only]
    if launches:
        timed = "step_times" in options.parts and (not options.only or {*options.only} & {*TIMED})
        bench.reserved = options.timing if timed else 0.0
        if options.parts != ["paper"]:
            bench.side_by_side(
                [
                    partial(save_start, bench, "dense", f"{small} --mhc"),
                    partial(save_start, bench, "moe", f"{small} {MOE} --mhc"),
                ]
            )
        bench.side_by_side(launches)
        for check in (check for _, checks in correct for check in checks):
            check()
    if "step_times" in options.parts:
        bench.reserved = 0.0
        names = [name for name in TIMED if not options.only or name in options.only]
        step_times(bench, gpus, large, names)
    table = [f"{'run':24}{'GPUs':>5}{'s':>6}{'step ms':>9}{'GiB':>7}{'last loss':>14}  what"]
    for run in bench.runs.values():
        last = run.losses[-1] if run.losses else "-"
        what = f"FAILED ({run.failure}) {run.remark}" if run.failure else run.remark
        table.append(
            f"{run.name:24}{run.gpus:5}{run.seconds:6.0f}{run.step_ms:9.1f}{run.peak_gib:7.1f}"
            f"{last:>14}  {what}"
        )
    table.append(f"{time.time() - bench.begin:.0f} s in all")
    print("\n".join(table))
    (bench.out / "table.txt").write_text("\n".join(table) + "\n")
    return sum(bool(run.failure) for run in bench.runs.values())


if __name__ == "__main__":
    sys.exit(main())
