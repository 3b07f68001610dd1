"""Step time and memory of a Megatron-Core GPT with mHC beside the ordinary one, on one GPU.

    python benchmarks/model/layers.py --json layers.json
    python benchmarks/model/layers.py --train 200 --layers 4 --hidden 512 --ffn 1408 \\
        --heads 8 --groups 8 --sequence 512 --batch 8

Forward and backward of whole models with Transformer Engine's layer spec in bf16: ordinary, mHC
with Triton kernels, and (with --reference) mHC with the PyTorch reference. CUDA events, the median
of --steps steps after three that warm up; peak memory by PyTorch's allocator. `--train N` instead
trains N steps from the same start with both backends and prints both curves.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import command_line, gpt, plotting
from benchmarks.common.timing import events
from benchmarks.model.gpt import build, loss_of, random_tokens
from megatron_mhc import MHCConfig
from megatron_mhc.metrics import strict_json

COLUMNS = ("forward_ms", "step_ms", "spread_ms", "activations_gib", "peak_gib")


def measure(options: argparse.Namespace, mhc: MHCConfig | None) -> dict[str, float]:
    """Median milliseconds of forward, and of forward and backward; memory in GiB."""
    model = build(options, mhc)
    tokens = random_tokens(options)
    forward, whole = [], []
    held = 0.0
    for step in range(options.steps + 3):
        begin, middle, end = events(3)
        before = torch.cuda.memory_allocated()
        begin.record()
        loss = loss_of(model, options, tokens)
        middle.record()
        held = (torch.cuda.memory_allocated() - before) / 2**30
        loss.backward()
        end.record()
        torch.cuda.synchronize()
        if step == 2:
            torch.cuda.reset_peak_memory_stats()
        if step > 2:
            forward.append(begin.elapsed_time(middle))
            whole.append(begin.elapsed_time(end))
    result = {
        "forward_ms": statistics.median(forward),
        "step_ms": statistics.median(whole),
        "spread_ms": max(whole) - min(whole),
        "activations_gib": held,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "parameters_gib": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30,
    }
    del model, loss
    torch.cuda.empty_cache()
    return result


def compare_times(options: argparse.Namespace) -> dict[str, Any]:
    """Print and return a row a model; the ordinary one again at the end shows what drifts."""
    cases: dict[str, MHCConfig | None] = {"ordinary": None, "mHC": MHCConfig(backend="triton")}
    if options.reference:
        cases["mHC, reference"] = MHCConfig(backend="torch")
    cases["ordinary again"] = None
    results: dict[str, Any] = {}
    print(f"{'':16}" + "".join(f"{name:>17}" for name in COLUMNS) + "   step over ordinary")
    for name, mhc in cases.items():
        results[name] = measure(options, mhc)
        ratio = results[name]["step_ms"] / results["ordinary"]["step_ms"]
        values = "".join(f"{results[name][column]:17.3f}" for column in COLUMNS)
        print(f"{name:16}{values}   {ratio:.4f}", flush=True)
    return results


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
    command_line.add_numbers(parser, command_line.GPT | {"batch": 2, "steps": 15})
    parser.add_argument("--train", type=int, default=0, metavar="N", help="compare N steps instead")
    parser.add_argument("--reference", action="store_true", help="time the PyTorch reference too")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--png", type=Path, help="with --train: draw the curves here")
    return command_line.parse_on_gpu(parser)


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
