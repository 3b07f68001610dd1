"""What the host does for a site: its time, its launches, its calls, beside the ordinary model.

    python benchmarks/model/host.py          # on a GPU
    python benchmarks/model/host.py --cpu    # what Python costs, without one

A Megatron-Core GPT too small for a GPU to matter: ordinary, mHC, mHC with selective recompute, in
one process and in rounds, one step each a round. Times are the host's clock, with an empty queue in
front of every forward and every backward: medians over the rounds, a site (two a layer), beyond the
ordinary model's. Transformer Engine's layers where it is installed, else Megatron's own.

`--cpu` launches nothing: an empty call stands where Triton's launcher would be, tensors are the
CPU's, and layers Megatron's own, as narrow as can be. It shows what Python and PyTorch's dispatcher
cost: the least of the rounds, in time of the processor, so that other processes do not count. It
leaves out Triton's launcher, the driver and CUDA's allocator: a GPU's figures are larger.
"""

import argparse
import gc
import importlib.util
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.model.empty_launches import Empty, without_launches, without_wrappers
from benchmarks.model.own_calls import allocations, calls_of_others, ours, profiled
from megatron_mhc import MHCConfig
from megatron_mhc.patches import cpu

KINDS: dict[str, MHCConfig | None] = {
    "ordinary": None,
    "mHC": MHCConfig(backend="triton"),
    "recompute": MHCConfig(backend="triton", recompute="auto"),
}


def build(options: argparse.Namespace, mhc: MHCConfig | None) -> torch.nn.Module:
    """The model of these options; without Transformer Engine Megatron's own layers."""
    from megatron.core.models.gpt import gpt_layer_specs as specs  # inside the stand-in, if any

    from benchmarks.common import gpt

    if importlib.util.find_spec("transformer_engine") and not options.cpu:
        spec = specs.get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    # what Megatron's own layers fuse with Apex's kernels
    unfused = {"masked_softmax_fusion": False, "persist_layer_norm": False}
    return gpt.build(gpt.dense_config(options, **unfused), spec, mhc, options.tokens)


class Step:
    """A forward and a backward of one model, gradients made anew."""

    def __init__(self, options: argparse.Namespace, mhc: MHCConfig | None) -> None:
        from benchmarks.common.gpt import VOCABULARY  # inside the stand-in, if any

        device = "cpu" if options.cpu else "cuda"
        self.model = build(options, mhc)
        self.parameters = list(self.model.parameters())
        self.tokens = torch.randint(0, VOCABULARY, (1, options.tokens + 1), device=device)
        self.positions = torch.arange(options.tokens, device=device)[None]
        self.wait: Callable[[], None] = (lambda: None) if options.cpu else torch.cuda.synchronize
        self.clock = time.process_time if options.cpu else time.perf_counter

    def __call__(self) -> tuple[float, float]:
        """Seconds of the forward, and of both, on the host."""
        for parameter in self.parameters:
            parameter.grad = None
        self.wait()
        begin = self.clock()
        logits = self.model(self.tokens[:, :-1], self.positions, None, labels=self.tokens[:, 1:])
        loss = logits.float().mean()
        forward = self.clock() - begin
        self.wait()
        begin = self.clock()
        loss.backward()
        return forward, forward + self.clock() - begin


def python_calls(step: Step) -> int:
    """Calls of Python functions in a step."""
    with profiled() as profile:
        step()
    return pstats.Stats(profile).total_calls  # type: ignore[attr-defined]


def kernels_launched(step: Step) -> int:
    """Kernels, copies and fills of a step on the GPU."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == kind for event in profiler.events())


def where(step: Step, sites: int, steps: int = 10, rows: int = 24) -> None:
    """Print which of our functions take the time, microseconds a site and step."""
    with profiled() as profile:
        for _ in range(steps):
            step()
    all_of = steps * sites
    listed = [(t * 1e6 / all_of, calls / all_of, place) for place, calls, t in ours(profile)]
    print("\nmHC: our functions, with the C functions that each calls, under cProfile")
    print(f"{'us a site':>10}{'calls':>8}")
    for microseconds, calls, place in sorted(listed, reverse=True)[:rows]:
        print(f"{microseconds:10.2f}{calls:8.2f}  {place}")
    print(f"{sum(row[0] for row in listed):10.2f}{sum(row[1] for row in listed):8.2f}  all")


def inside(options: argparse.Namespace, empty: Empty) -> dict[str, float]:
    """Of a site inside a model, neither its first nor its last, in a step with mHC: launches by
    kernel, `calls` of our Python functions and theirs `of_others`, and the tensors they make."""
    steps, counts = [], []
    for options.layers in (2, 4):
        steps.append(Step(options, KINDS["mHC"]))
        steps[-1]()
    without_wrappers()
    for step in steps:
        with profiled(builtins=True) as profile:
            step()
        empty.counts.clear()
        with profiled() as calls:
            step()
        counts.append(
            {
                **empty.counts,
                "calls": sum(count for _, count, _ in ours(calls)),
                "calls_of_others": calls_of_others(calls),
                "made_like_another": allocations(profile, "empty_like"),
                "made_of_a_shape": allocations(profile, "new_empty", "torch.empty>"),
            }
        )
    few, more = counts
    return {name: (more[name] - few[name]) / 4 for name in more}


def measure(options: argparse.Namespace, steps: dict[str, Step]) -> dict[str, tuple[float, float]]:
    """Seconds of the forward, and of both: the median of the rounds, on a CPU the least."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(step())
    gc.enable()
    of = min if options.cpu else statistics.median
    return {
        name: (of(forward for forward, _ in taken), of(both for _, both in taken))
        for name, taken in times.items()
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="no GPU, no launches")
    parser.add_argument("--inside", action="store_true", help="with --cpu: counts, as JSON")
    parser.add_argument("--layers", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--hidden", type=int, help="C (default: 512; 64 with --cpu)")
    parser.add_argument("--tokens", type=int, help="(default: 256; 8 with --cpu)")
    parser.add_argument("--rounds", type=int, default=50, help="(default: %(default)s)")
    options = parser.parse_args()
    options.hidden = options.hidden or (64 if options.cpu else 512)
    options.tokens = options.tokens or (8 if options.cpu else 256)
    options.ffn, options.heads, options.groups = 2 * options.hidden, 8, 8
    return options


def start(options: argparse.Namespace) -> Empty | None:
    """A process group of one; on a CPU all that stands in for a GPU."""
    empty = None
    if options.cpu:
        torch.set_num_threads(1)
        cpu.enter()
        empty = without_launches()
    from benchmarks.common import gpt

    gpt.join()
    return empty


def main() -> None:
    """Measure, count, and say where the time goes."""
    options = parse()
    empty = start(options)
    if options.inside and empty is not None:
        print(json.dumps(inside(options, empty)))
    else:
        report(options, empty)
    dist.destroy_process_group()
    if options.cpu:
        cpu.leave()


def report(options: argparse.Namespace, empty: Empty | None) -> None:
    """The table, and where the time goes."""
    steps = {name: Step(options, mhc) for name, mhc in KINDS.items()}
    for step in steps.values():
        for _ in range(3):
            step()
    if options.cpu:
        without_wrappers()
    sites = 2 * options.layers
    launches, calls = {}, {}
    for name, step in steps.items():
        calls[name] = python_calls(step) / sites
        if empty is None:
            launches[name] = kernels_launched(step) / sites
        else:
            empty.counts.clear()
            step()
            launches[name] = sum(empty.counts.values()) / sites
    taken = measure(options, steps)
    where_run = "a CPU, no launches" if options.cpu else torch.cuda.get_device_name()
    print(f"{where_run}; PyTorch {torch.__version__}; {options.layers} layers of C")
    print(f"{options.hidden}, {options.tokens} tokens. A site, and beyond the ordinary model's:\n")
    print(f"{'':10}{'forward us':>20}{'both ways us':>20}{'launches':>16}{'Python calls':>18}")
    for name, (forward, both) in taken.items():
        row = f"{name:10}"
        columns = ((forward * 1e6 / sites, taken["ordinary"][0] * 1e6 / sites, 20),)
        columns += ((both * 1e6 / sites, taken["ordinary"][1] * 1e6 / sites, 20),)
        columns += ((launches[name], launches["ordinary"], 16),)
        columns += ((calls[name], calls["ordinary"], 18),)
        for value, ordinary, width in columns:
            row += f"{f'{value:.1f} {value - ordinary:+.1f}':>{width}}"
        print(row)
    where(steps["mHC"], sites)


if __name__ == "__main__":
    main()
