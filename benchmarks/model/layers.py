"""Step time and memory of a Megatron-Core GPT with mHC beside the ordinary one, on one GPU.

    python benchmarks/model/layers.py --json layers.json
    python benchmarks/model/layers.py --moe --batch 4       # the paper's layers: MLA, experts
    PYTHONPATH=MEGATRON_DEV MEGATRON_MHC_PATCHES=-schedule-node-detach \\
        python benchmarks/model/layers.py --megatron-dev    # and the mHC of Megatron's branch dev
    python benchmarks/model/layers.py --train 200 --layers 4 --hidden 512 --ffn 1408 \\
        --heads 8 --groups 8 --sequence 512 --batch 8

Forward and backward of whole models with Transformer Engine's layer spec in bf16: ordinary, mHC
with Triton kernels, and (with --reference) mHC with the PyTorch reference. All are in memory and
take turns a step at a time, --rounds of them behind three that warm up, so that a clock that drifts
drifts for all. Milliseconds are medians by CUDA events; "over ordinary" is the median of each
round's own ratio, low and high its tenths and nine tenths. Memory is that of PyTorch's allocator
in GiB, the peak of a step beyond what stands before it. `--train N` instead trains N steps from the
same start with both backends and prints both curves.

--moe: C 2560, a dense layer and 12 routed experts of 1536 (six a token) and a shared one in each
of the others, multi-latent attention: `examples/moe/cluster.sh`'s layers with fewer experts.
--megatron-dev: all models are built by the source that stands on the path, and one has its mHC with
`--use-fused-mhc`, as many streams and Sinkhorn iterations as ours; a patch of ours for overlap
across experts does not find its target there, and is not needed here.
--by-kernel: the GPU's time of a step by torch.profiler, five steps of each case in turn: in all,
between the kernels, in kernels that the ordinary model has not, and in those of its own names.
Below it the kernels whose time differs most from the ordinary model's, by so many milliseconds.
"""

import argparse
import inspect
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import command_line, gpt, plotting
from benchmarks.common.timing import events
from benchmarks.common.turns import in_turn, ratio
from benchmarks.kernels.by_kernel import kernel_times, longer_than
from benchmarks.model.gpt import build, loss_of, random_tokens
from megatron_mhc import MHCConfig
from megatron_mhc.metrics import strict_json

COLUMNS = (
    *("forward_ms", "step_ms", "over_ordinary", "low", "high"),
    *("activations_gib", "peak_gib", "parameters_gib"),
)
PRINTED = 16
"""Kernels that --by-kernel names of a model."""


class Case:
    """A model and its steps."""

    def __init__(self, options: argparse.Namespace, mhc: MHCConfig | None, **settings: Any) -> None:
        self.options, self.tokens = options, random_tokens(options)
        self.model = build(options, mhc, **settings)

    def step(self) -> tuple[float, float]:
        """Milliseconds of forward, and of forward and backward."""
        begin, middle, end = events(3)
        begin.record()
        loss = loss_of(self.model, self.options, self.tokens)
        middle.record()
        loss.backward()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(middle), begin.elapsed_time(end)

    def memory(self) -> dict[str, float]:
        """GiB: what the forward leaves for the backward, the peak of both, the parameters."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = loss_of(self.model, self.options, self.tokens)
        held = torch.cuda.memory_allocated() - before
        loss.backward()
        sizes = {
            "activations_gib": held,
            "peak_gib": torch.cuda.max_memory_allocated() - before,
            "parameters_gib": sum(p.nbytes for p in self.model.parameters()),
        }
        return {name: size / 2**30 for name, size in sizes.items()}


def compare_times(options: argparse.Namespace) -> dict[str, Any]:
    """Print and return a row a model."""
    wanted: dict[str, MHCConfig | None] = {"ordinary": None, "mHC": MHCConfig(backend="triton")}
    if options.reference:
        wanted["mHC, reference"] = MHCConfig(backend="torch")
    cases = {name: Case(options, mhc) for name, mhc in wanted.items()}
    if options.megatron_dev:
        cases["Megatron dev"] = Case(
            options, None, enable_hyper_connections=True, use_fused_mhc=True
        )
    results: dict[str, Any] = {}
    for name, case in cases.items():
        for _ in range(3):  # warms up: kernels, the allocator, gradients
            case.step()
        results[name] = case.memory()
    times = in_turn({name: case.step for name, case in cases.items()}, options.rounds)
    wholes = {name: [whole for _, whole in pairs] for name, pairs in times.items()}
    print(f"{'':16}" + "".join(f"{name:>17}" for name in COLUMNS))
    for name, row in results.items():
        row["forward_ms"] = statistics.median(forward for forward, _ in times[name])
        row["step_ms"] = statistics.median(wholes[name])
        beside = ratio(wholes[name], wholes["ordinary"])
        row |= {"over_ordinary": beside.median, "low": beside.low, "high": beside.high}
        print(f"{name:16}" + "".join(f"{row[column]:17.3f}" for column in COLUMNS), flush=True)
    if options.by_kernel:
        for name, found in by_kernel(cases).items():
            results[name] |= found
    return results


def by_kernel(cases: dict[str, Case], steps: int = 5) -> dict[str, dict[str, Any]]:
    """Print and return what the GPU does in a step of each model, milliseconds.

    Returns:
        Of each model `kernels_ms`, sums, and `beyond_ordinary_ms`, how much longer each kernel (and
        the time between them) takes than in the ordinary model.
    """
    launched: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(steps):
        for name, case in cases.items():
            launched[name].append(kernel_times(lambda _, case=case: case.step(), 1, runs=1))
    times = {name: _medians(each) for name, each in launched.items()}
    ordinary, rows = times["ordinary"], {}
    for name, own in times.items():
        gaps = own["between kernels"]
        more = sum(time for kernel, time in own.items() if kernel not in ordinary)
        total = sum(own.values()) - gaps
        row = {"all": total + gaps, "between": gaps, "more": more, "ordinary's": total - more}
        sums = {column: time / 1000 for column, time in row.items()}
        print(f"{name:16}" + "".join(f"{key:>12} {ms:8.3f}" for key, ms in sums.items()))
        beyond = {kernel: time / 1000 for kernel, time in longer_than(ordinary, own).items()}
        for kernel, ms in itertools.islice(beyond.items(), PRINTED if name != "ordinary" else 0):
            print(f"{ms:+20.3f} ms  {kernel[:90]}")
        rows[name] = {"kernels_ms": sums, "beyond_ordinary_ms": beyond}
    return rows


def _medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of each kernel's time over the steps; a step that has not launched it counts as 0."""
    names = {name for step in steps for name in step}
    return {name: statistics.median(step.get(name, 0.0) for step in steps) for name in names}


def train(options: argparse.Namespace, mhc: MHCConfig) -> list[float]:
    """Losses of `--train` Adam steps on random bytes with a pattern to learn."""
    model = build(options, mhc)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    generator = torch.Generator(device="cuda").manual_seed(5)
    losses = []
    for _ in range(options.train):
        shape = (options.batch, 1)
        start, stride = (
            torch.randint(0, gpt.VOCABULARY, shape, device="cuda", generator=generator)
            for _ in "12"
        )
        steps = torch.arange(options.sequence + 1, device="cuda")
        tokens = (start + (stride % 7 + 1) * steps) % gpt.VOCABULARY
        loss = loss_of(model, options, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def compare_losses(options: argparse.Namespace) -> dict[str, Any]:
    """Print some of the losses of both backends, and return all."""
    results = {name: train(options, MHCConfig(backend=name)) for name in ("torch", "triton")}
    pairs = list(zip(results["torch"], results["triton"], strict=True))
    for step in sorted({*range(0, options.train, max(1, options.train // 20)), options.train - 1}):
        print(f"step {step:4}  torch {pairs[step][0]:.5f}  triton {pairs[step][1]:.5f}")
    worst = max(abs(a - b) for a, b in pairs)
    print(f"largest difference {worst:.2e}")
    if options.png:
        draw(results, options.png)
    return results


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The losses of both backends, and how far they are apart."""
    figure, (above, below) = plotting.pyplot().subplots(2, sharex=True, figsize=(8, 6))
    for backend, losses in curves.items():
        above.plot(losses, "-" if backend == "torch" else "--", label=backend)
    above.set_ylabel("training loss, nats")
    above.legend()
    apart = [abs(a - b) for a, b in zip(*curves.values(), strict=True)]
    below.semilogy(apart, color="black", linewidth=0.8)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser(__doc__)
    command_line.add_numbers(parser, command_line.GPT | {"batch": 2, "rounds": 20})
    parser.add_argument("--moe", action="store_true", help="the paper's layers, C 2560")
    parser.add_argument("--by-kernel", action="store_true", help="and the kernels of a step")
    parser.add_argument("--megatron-dev", action="store_true", help="time Megatron dev's mHC too")
    parser.add_argument("--train", type=int, default=0, metavar="N", help="compare N steps instead")
    parser.add_argument("--reference", action="store_true", help="time the PyTorch reference too")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--png", type=Path, help="with --train: draw the curves here")
    options = command_line.parse_on_gpu(parser)
    if options.megatron_dev and not hasattr(TransformerConfig, "use_fused_mhc"):
        where = inspect.getfile(TransformerConfig)
        parser.error(
            f"--megatron-dev: {where} has no use_fused_mhc: put dev's source on PYTHONPATH"
        )
    return options


def main() -> None:
    """Measure or train, print, and write JSON if asked to."""
    options = parse()
    gpt.join()
    results = compare_losses(options) if options.train else compare_times(options)
    if options.json:
        asked = vars(options) | {"json": "", "png": ""}
        options.json.write_text(strict_json.written({"options": asked, **results}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
