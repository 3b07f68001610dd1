"""Training runs on several GPUs of one host, through `examples/pretrain_gpt.py`, and a table.

    benchmarks/multi_gpu/run.sh --out runs/multi_gpu

`--ranks-per-gpu 4` gives every GPU several ranks, each a host of its own to NCCL, which then goes
over sockets: on one GPU it shows what four stages do over NCCL, and nothing about time.

Each run is a launch of its own with a time limit: one that fails is a line in the table and does
not stop the others. What is timed runs last and alone, the rest `--jobs` launches at a time:

* pipeline: losses of all GPUs as stages (at most 4, data parallel beyond) against one GPU; stock
  order, overlap and overlap with 2 in flight against each other, digit for digit (losses and
  gradient norms), also with timers on, and with late outputs (`late_ends.py`);
* pipelines beside data and tensor parallelism, and of three stages (four GPUs and more);
* MoE over expert parallel ranks, TP with sequence parallelism, CP: losses against one GPU;
* the paper's layers (MLA, mixture of experts, distributed optimizer with both overlaps), pipeline
  and expert parallel: recompute and overlap against stock order, digit for digit;
* the paper's layers with expert-parallel overlap (`expert_overlap.py`);
* save on several GPUs, resume on two and on one, and back, with the distributed optimizer;
* step times of larger models (dense; the paper's layers with all 72 experts): ordinary, mHC, with
  overlap, with recompute, and with both, in one launch a layout, three rounds (`rounds.py`); NCCL's
  send and receive kernels that no compute kernel runs beside, from traces of a further round.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.spans import exposed
from benchmarks.multi_gpu.launches import Bench, apart
from benchmarks.multi_gpu.parts.expert_overlap import expert_overlap

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
    --num-experts 12 --moe-layer-freq ([0]*1+[1]*7) --moe-ffn-hidden-size 1536 --moe-router-topk 6
    --moe-router-score-function sigmoid --moe-router-dtype fp32 --moe-router-enable-expert-bias
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4
    --moe-shared-expert-intermediate-size 3072 --moe-grouped-gemm --moe-permute-fusion
    --moe-token-dispatcher-type alltoall
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 1 --global-batch-size 8
"""
"""`examples/moe/cluster.sh`'s layers, fewer, and fewer experts."""
PAPER_EXPERTS = "--num-experts 72 --global-batch-size 16 --moe-router-force-load-balancing"
"""All experts, each with its share of tokens: an untrained router gives a rank many times as many
as another, and that is what one would time."""
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
        more = {"script": "benchmarks/multi_gpu/late_ends.py"} if name.endswith("late") else {}
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


def pipelines_beside(bench: Bench, gpus: int, size: str) -> Part:
    """Pipelines beside data and tensor parallelism, and of stages with unequal layers."""
    if gpus < 4:
        return [], []
    size = starting(bench, "dense", f"{size} --mhc")
    steps = 5 if bench.cpu else bench.options.steps
    two = "--pipeline-model-parallel-size 2"
    three = (
        "--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 3"
        " --decoder-last-pipeline-num-layers 2"
    )
    tensor = f"{two} --tensor-model-parallel-size 2 --sequence-parallel"
    layouts = {"dp2-pp2": (4, two), "tp2-pp2": (4, tensor), "pp3": (3, three)}
    launches, checks = [partial(bench.train, "one-beside", 1, size, min(steps, 20))], []
    for name, (ranks, flags) in layouts.items():
        # Megatron wants one queue for tensor parallelism
        more = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if "tensor" in flags else {}
        orders = {"": "--mhc", "-overlap": OVERLAP}
        if name == "pp3":
            orders["-overlap-2"] = f"{OVERLAP} --mhc-overlap-in-flight 2"
        for order, own in orders.items():
            whole = f"{size} {flags} {own}"
            launches.append(partial(bench.train, name + order, ranks, whole, steps, **more))
            if order:
                checks.append(partial(bench.alike, name + order, name, None))
        checks.append(partial(bench.alike, "one-beside", name, 2e-2))
    return launches, checks


TIMED = {
    "ordinary": "",
    "mhc": "--mhc",
    "overlap": OVERLAP,
    "overlap-2": f"{OVERLAP} --mhc-overlap-in-flight 2",
    "recompute": "--mhc --mhc-recompute auto",
    "overlap-recompute": f"{OVERLAP} --mhc-recompute auto",
}


def step_times(bench: Bench, gpus: int) -> None:
    """Steps of larger models: ordinary, mHC in stock order, with overlap, with recompute."""
    dense = f"{TINY if bench.cpu else LARGE} --log-memory-interval 5"
    paper = paper_size(bench) + ("" if bench.cpu else PAPER_EXPERTS) + " --log-memory-interval 5"
    two = "--pipeline-model-parallel-size 2"
    groups = {
        "dense-pp": (f"{dense} --pipeline-model-parallel-size {min(gpus, 4)}", TIMED),
        "paper-pp-ep": (f"{paper} {two} --expert-model-parallel-size {gpus // 2}", TIMED),
        "paper-ep": (
            f"{paper} --expert-model-parallel-size {gpus}",
            {name: TIMED[name] for name in ("ordinary", "mhc", "recompute")}
            | {
                "ordinary-ep-overlap": "--overlap-moe-expert-parallel-comm",
                "ep-overlap": "--mhc --overlap-moe-expert-parallel-comm",
            },
        ),
    }
    for name, (flags, variants) in groups.items():
        if bench.options.only and name not in bench.options.only:
            continue
        bench.rounds(
            name, gpus, flags, variants,
            number=bench.options.rounds, iterations=5 if bench.cpu else 9,
            trace=not bench.cpu and name == "dense-pp",
            # what runs use that want speed; the comparisons of digits go without
            NVTE_ALLOW_NONDETERMINISTIC_ALGO="1",
        )  # fmt: skip
        traces = bench.out / "traces" / name
        for variant in variants if traces.exists() else ():
            ranks = sorted((traces / variant).rglob("*.json*"))
            if ranks:
                alone = [exposed(trace) for trace in ranks]
                bench.runs[f"{name}: {variant}"].remark += "; " + ", ".join(
                    f"{key} {'/'.join(f'{rank[key]:.0f}' for rank in alone)}" for key in alone[0]
                )


def other_parallelism(bench: Bench, gpus: int, size: str) -> Part:
    """MoE over expert parallel ranks, TP with sequence parallelism, CP."""
    steps = 5 if bench.cpu else 20
    moe = starting(bench, "moe", f"{size} {MOE} --mhc")
    dense = starting(bench, "dense", f"{size} --mhc")
    one_queue = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    split = min(gpus, 4)
    tensor = f"{dense} --tensor-model-parallel-size {split} --sequence-parallel"
    launches = [
        partial(bench.train, "moe-one", 1, moe, steps),
        partial(bench.train, "dense-one", 1, dense, steps, first=1),
        partial(bench.train, "moe-ep", gpus, f"{moe} --expert-model-parallel-size {gpus}", steps),
        partial(bench.train, "tp-sp", split, tensor, steps, **one_queue),
    ]
    checks = [
        partial(bench.alike, "moe-ep", "moe-one", 2e-2),
        partial(bench.alike, "tp-sp", "dense-one", 2e-2),
    ]
    if not bench.cpu:
        context = f"{dense} --context-parallel-size {split}"
        launches.append(partial(bench.train, "cp", split, context, steps, **one_queue))
        checks.append(partial(bench.alike, "cp", "dense-one", 2e-2))
    return launches, checks


def paper_size(bench: Bench) -> str:
    """Flags of the paper's layers; on a CPU small, and without what Transformer Engine fuses."""
    if not bench.cpu:
        return PAPER
    fused = ("--moe-permute-fusion", "--moe-grouped-gemm", "--qk-layernorm")
    return " ".join(flag for flag in PAPER.split() if flag not in fused) + TINY_PAPER


def paper(bench: Bench, gpus: int, _: str) -> Part:
    """The paper's layers: what changes nothing but the order of work changes no digit."""
    size = paper_size(bench)
    if gpus >= 2:
        size += " --pipeline-model-parallel-size 2"
    if gpus >= 4:
        size += " --expert-model-parallel-size 2"
    experts = size.replace("--pipeline-model-parallel-size 2", "").replace(
        "--expert-model-parallel-size 2", "--expert-model-parallel-size 4"
    )
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
    if gpus >= 4:
        runs |= {"paper-ep": "--mhc", "paper-ep-recompute": "--mhc --mhc-recompute auto"}
    launches = [
        partial(
            bench.train, name, gpus,
            f"{experts if 'ep' in name.split('-') else size} {flags}", steps,
            **(free if "free" in name else {}),
        )
        for name, flags in runs.items()
    ]  # fmt: skip
    exact = [
        name
        for name in runs
        if "free" not in name and name not in ("paper", "paper-ordinary", "paper-ep")
    ]
    checks = [
        partial(bench.alike, name, "paper-ep" if "-ep-" in name else "paper", None)
        for name in exact
    ]
    # ten times apart is no bound: these lines are there for their distance
    checks += [partial(bench.alike, name, "paper", 10) for name in runs if "free" in name]
    return launches, checks


def resume(bench: Bench, gpus: int, size: str) -> Part:
    """Save on several GPUs, go on with fewer and with one, and back; distributed optimizer."""
    size += " --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
    folder, steps = bench.out / "checkpoints", 3 if bench.cpu else 10
    shutil.rmtree(folder, ignore_errors=True)
    both = f"{size} --save {folder} --save-interval {steps} --override-opt-param-scheduler"
    stages = f"--pipeline-model-parallel-size {min(gpus, 4)} {OVERLAP}"
    two = "--pipeline-model-parallel-size 2 --mhc"
    legs = {"save": (gpus, stages), "resume-on-one": (1, "--mhc"), "back": (gpus, stages)}
    if gpus > 2:
        legs = {"save": legs["save"], "resume-on-two": (2, two), **legs}
    whole = f"{both} {stages}".replace(str(folder), f"{folder}-0")

    def one_after_the_other() -> None:
        for index, (name, (ranks, flags)) in enumerate(legs.items()):
            start = f"--load {folder}" if index else ""
            bench.train(name, ranks, f"{both} {start} {flags}", (index + 1) * steps)

    def compare() -> None:
        runs = [bench.runs[name] for name in ("whole", *legs)]
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

    uninterrupted = partial(bench.train, "whole", gpus, whole, len(legs) * steps)
    return [one_after_the_other, uninterrupted], [compare]


def overlapped_experts(bench: Bench, gpus: int, _: str) -> Part:
    """`expert_overlap.py` with the paper's layers."""
    return expert_overlap(bench, gpus, paper_size(bench))


CORRECT = {
    "pipelines": pipelines,
    "pipelines_beside": pipelines_beside,
    "other_parallelism": other_parallelism,
    "paper": paper,
    "resume": resume,
    "expert_overlap": overlapped_experts,
}
"""Parts whose launches may run side by side: nothing in them is timed."""
PARTS = (*CORRECT, "step_times")
STEP_TIMES = ("dense-pp", "paper-pp-ep", "paper-ep")
"""What `--only` names of the step times."""


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
    parser.add_argument("--rounds", type=int, default=3, help="of what is timed")
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
    small = TINY if options.cpu else SMALL
    if gpus > 2:  # two virtual stages each
        small = small.replace("--num-layers 4", f"--num-layers {2 * min(gpus, 4)}")
    correct = [CORRECT[name](bench, gpus, small) for name in options.parts if name in CORRECT]
    if options.only:
        if "resume" in options.parts:
            parser.error("--only does not go with --parts resume")
        # each launch is a partial of `train`, whose first argument is the run's name
        known = {launch.args[0] for launches, _ in correct for launch in launches}
        known |= {*STEP_TIMES} if "step_times" in options.parts else set()
        if unknown := {*options.only} - known:
            parser.error(f"--only: no {', '.join(unknown)} among {', '.join(sorted(known))}")
    launches = [launch for launches, _ in correct for launch in launches]
    if options.only:
        launches = [launch for launch in launches if launch.args[0] in options.only]
    if launches:
        timed = "step_times" in options.parts and (
            not options.only or {*options.only} & {*STEP_TIMES}
        )
        bench.reserved = options.timing if timed else 0.0
        if not {*options.parts} <= {"paper", "expert_overlap"}:
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
        step_times(bench, gpus)
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
