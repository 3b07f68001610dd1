"""How much of a pipeline's communication `--mhc-overlap-p2p` hides: one stage, on one GPU.

    python benchmarks/pipeline/overlap.py --out runs/pipeline     # times, traces, a timeline
    python benchmarks/pipeline/overlap.py --equal 200             # stock order and ours, bit by bit
    torchrun --nproc-per-node 2 benchmarks/pipeline/overlap.py    # real neighbours, over NCCL

Under torchrun every process is a stage (`real_links.py`), `--layers` on each. In one process the
stage is real and its neighbours are not (`stage.py`). Stock order is Megatron's own 1F1B function
without its host synchronisations; exposed is what a step takes longer than over links that take no
time, a median over rounds. "ready" neighbours have every message waiting: what is exposed is this
stage's doing. "computing" neighbours are as fast as this one, in the same schedule: a gradient's
way back is in.
"""

import argparse
import gc
import gzip
import json
import os
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
CPU = "--cpu" in sys.argv
if CPU:
    from megatron_mhc.patches import cpu

    cpu.enter()
if "--equal" in sys.argv:
    # Transformer Engine's attention has a faster backward that adds in any order
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import schedules  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402

from benchmarks.common.spans import together, union  # noqa: E402
from benchmarks.pipeline import real_links  # noqa: E402
from benchmarks.pipeline.stage import (  # noqa: E402
    Neighbours,
    Pace,
    Sizes,
    build_stage,
    cycles_per_ms,
)
from megatron_mhc import MHCConfig  # noqa: E402
from megatron_mhc.model.config_marks import IN_FLIGHT  # noqa: E402
from megatron_mhc.pipeline.state import state_of  # noqa: E402

KINDS = ("ready", "computing")
MODES = {"stock order": 0, "overlap": 1, "overlap, 2 in flight": 2}


class Stage:
    """The model chunk, and steps of it in either order."""

    def __init__(self, sizes: Sizes, mhc: MHCConfig, microbatches: int) -> None:
        self.sizes, self.microbatches = sizes, microbatches
        self.model, self.groups = build_stage(sizes, mhc)
        self.config = get_model_config(self.model)
        shape = (self.sizes.sequence, self.sizes.batch, self.sizes.hidden * mhc.num_streams)
        self.wire_bytes = 2 * torch.Size(shape).numel()
        self.neighbours = Neighbours(self.config, self.groups.pp, shape, Pace(), cycles_per_ms())

    def choose(self, mode: str, pace: Pace) -> None:
        """The order of the steps that follow, and the pace of links and neighbours."""
        self.neighbours.set_pace(pace)
        setattr(self.config, IN_FLIGHT, MODES[mode])
        state_of(self.model).side_streams = None

    def step(self, forward_only: bool = False) -> None:
        """One step; gradients stay in the parameters."""
        for parameter in self.model.parameters():
            parameter.grad = None
        self.neighbours.begin(self.microbatches, max(1, getattr(self.config, IN_FLIGHT)))
        positions = torch.arange(self.sizes.sequence, device="cuda")[None]

        def forward_step(_: Any, model: torch.nn.Module) -> tuple[Any, Any]:
            return model(None, positions, self.sizes.mask()), None

        schedules.forward_backward_pipelining_without_interleaving(
            forward_step_func=forward_step,
            data_iterator=None,
            model=self.model,
            num_microbatches=self.microbatches,
            seq_length=self.sizes.sequence,
            micro_batch_size=self.sizes.batch,
            forward_only=forward_only,
            p2p_communicator=self.neighbours,
            pg_collection=self.groups,
        )

    def time(
        self, mode: str, pace: Pace, steps: int, forward_only: bool = False
    ) -> tuple[float, float]:
        """The median of some steps in milliseconds, after two that warm up; peak memory in GiB."""
        self.choose(mode, pace)
        times = []
        gc.disable()  # a collection in mid-step takes as long as what is looked for
        for index in range(steps + 2):
            gc.collect()  # what a step left in cycles would be held during the next one
            if index == 2:
                torch.cuda.reset_peak_memory_stats()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.step(forward_only)
            end.record()
            torch.cuda.synchronize()
            if index >= 2:
                times.append(begin.elapsed_time(end))
        gc.enable()
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
        return statistics.median(times), peak


@dataclass
class Case:
    """An order of the steps among one kind of neighbours: what each round measured.

    Attributes:
        steps, free: medians of a round's steps, ms; over links that take no time.
        peak: GiB.
    """

    steps: list[float] = field(default_factory=list)
    free: list[float] = field(default_factory=list)
    peak: float = 0.0

    def exposed(self, beside: "Case") -> list[float]:
        """ms of each round beyond a step of `beside` over links that take no time."""
        return [step - free for step, free in zip(self.steps, beside.free, strict=True)]


def report(kind: str, cases: dict[str, Case]) -> dict[str, Any]:
    """Print and return the rows of one kind of neighbours; the first case is stock order."""
    stock = next(iter(cases.values()))
    of_stock = statistics.median(stock.exposed(stock))
    rows = {}
    for mode, case in cases.items():
        own, stocks = case.exposed(case), case.exposed(stock)
        step = statistics.median(case.steps)
        row = {
            "step_ms": step,
            "step_ms_by_round": case.steps,
            "free_ms": statistics.median(case.free),
            "free_ms_by_round": case.free,
            "exposed_ms": statistics.median(own),
            "beyond_stock_free_ms": statistics.median(stocks),
            "peak_gib": case.peak,
        }
        rows[f"{kind}, {mode}"] = row
        print(
            f"{kind:11}{mode:22}{step:9.1f}{max(case.steps) - min(case.steps):8.1f}"
            f"{row['free_ms']:11.1f}{row['exposed_ms']:11.2f}{min(own):8.1f}{max(own):8.1f}"
            f"{row['exposed_ms'] / step:9.1%}{row['exposed_ms'] / of_stock:9.1%}"
            f"{row['beyond_stock_free_ms'] / of_stock:10.1%}{case.peak:9.1f}",
            flush=True,
        )
    return rows


def measure(stage: Stage, options: argparse.Namespace) -> dict[str, Any]:
    """The table: each mode and kind of neighbour, over links that take time and that do not.

    In rounds, so that a machine that drifts does so under all cases alike.
    """
    forward = stage.time("stock order", Pace(), options.steps, forward_only=True)[0]
    whole = stage.time("stock order", Pace(), options.steps)[0]
    forward, whole = forward / stage.microbatches, whole / stage.microbatches
    message = stage.wire_bytes / options.gigabytes / 1e6 + options.latency_us / 1e3
    print(
        f"a microbatch: forward {forward:.2f} ms, backward {whole - forward:.2f} ms;"
        f" a message: {stage.wire_bytes / 1e6:.0f} MB, {message:.2f} ms at"
        f" {options.gigabytes} GB/s and {options.latency_us} us"
    )
    link = {"gigabytes": options.gigabytes, "latency_us": options.latency_us}
    # a little faster, so that what is measured is this stage
    busy = {"forward_ms": 0.98 * forward, "backward_ms": 0.98 * (whole - forward)}
    neighbours: dict[str, dict[str, float]] = {"ready": {}, "computing": busy}
    cases = {kind: {mode: Case() for mode in MODES} for kind in options.neighbours}
    rows: dict[str, Any] = {}
    for number in range(options.rounds):
        for kind in cases:
            compute = neighbours[kind]
            for mode, case in cases[kind].items():
                case.free.append(stage.time(mode, Pace(**compute), options.steps)[0])
                step, peak = stage.time(mode, Pace(**link, **compute), options.steps)
                case.steps.append(step)
                case.peak = max(case.peak, peak)
        print(
            f"after round {number + 1} of {options.rounds}; of stock: of what stock order exposes,"
            " by the order's own step over free links and by stock order's\n"
            f"{'neighbours':11}{'order':22}{'step ms':>9}{'spread':>8}{'free links':>11}"
            f"{'exposed ms':>11}{'least':>8}{'most':>8}{'of step':>9}{'of stock':>9}"
            f"{'by stock':>10}{'peak GiB':>9}"
        )
        for kind, found in cases.items():
            rows |= report(kind, found)
    rows["microbatch"] = {"forward_ms": forward, "backward_ms": whole - forward, "message": message}
    rows["busy"] = busy
    return rows


def operations(events: list[dict[str, Any]]) -> dict[int, str]:
    """Which of mHC's operations launched a kernel, by the correlation id of its launch."""
    ranges = [
        (event["tid"], float(event["ts"]), float(event["ts"]) + float(event["dur"]), event["name"])
        for event in events
        if event.get("cat") == "cpu_op" and event["name"].startswith("megatron_mhc::")
    ]
    launches = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    return {
        launch["args"]["correlation"]: name
        for launch in launches
        for thread, begin, end, name in ranges
        if launch["tid"] == thread and begin <= float(launch["ts"]) <= end
    }


def profile(stage: Stage, mode: str, pace: Pace, out: Path) -> dict[str, Any]:
    """A step as `record` has it: of up to three, the first with a combine beside compute.

    Raises:
        AssertionError: overlap was asked for, and none of three steps had one.
    """
    for _ in range(3):  # a GPU that others use too need not run two kernels at once
        result = record(stage, mode, pace, out)
        if mode == "stock order" or result["combines_beside_compute"]:
            return result
    raise AssertionError("no combine ran beside the compute stream")


def record(stage: Stage, mode: str, pace: Pace, out: Path) -> dict[str, Any]:
    """One step under the profiler: spans by lane, what it says about them, and a chrome trace."""
    stage.choose(mode, pace)
    for _ in range(2):
        stage.step()
    torch.cuda.synchronize()
    lanes = {"compute": torch.cuda.current_stream()}
    side_streams = state_of(stage.model).side_streams
    if side_streams is not None:
        lanes |= {f"priority {i}": stream for i, stream in enumerate(side_streams._streams)}
    for name in ("from_prev", "to_next", "from_next", "to_prev"):
        lanes[f"link {name}"] = getattr(stage.neighbours, name).stream
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as records:
        # a mark on each stream, one after the other, says which number the records give it
        for stream in lanes.values():
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1000)
            torch.cuda.synchronize()
        stage.step()
        torch.cuda.synchronize()
    path = out / f"{mode.replace(', ', '-').replace(' ', '-')}.json"
    records.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    path.unlink()
    kept = ("kernel", "gpu_memcpy", "gpu_memset")
    work = sorted((e for e in events if e.get("cat") in kept), key=lambda event: float(event["ts"]))
    marks = [event for event in work if "spin_kernel" in event["name"]][: len(lanes)]
    number = {e["args"]["stream"]: name for name, e in zip(lanes, marks, strict=True)}
    assert len(number) == len(lanes), f"two lanes on one stream: {number}"
    start = float(marks[-1]["ts"]) + float(marks[-1]["dur"])
    launched_by = operations(events)
    spans: dict[str, list[tuple[float, float, str]]] = {name: [] for name in lanes}
    for event in work:
        name, begin = number.get(event["args"]["stream"]), float(event["ts"])
        if name is not None and begin > start:
            operation = launched_by.get(event["args"].get("correlation"), "")
            label = f"{operation} {event['name']}"
            spans[name].append((begin, begin + float(event["dur"]), label))
    device = [e for e in events if e.get("cat") in kept or e.get("ph") == "M"]
    with gzip.open(f"{path}.gz", "wt") as file:
        json.dump({"traceEvents": device}, file)

    def of(prefix: str, word: str = "") -> list[tuple[float, float]]:
        return [
            (begin, end)
            for lane, found in spans.items()
            if lane.startswith(prefix)
            for begin, end, name in found
            if word in name
        ]

    compute, link = of("compute"), of("link")
    busy = sum(end - begin for begin, end in union(link))
    combines = of("priority", "megatron_mhc::combine")
    result: dict[str, Any] = {
        "link_ms": busy / 1e3,
        "exposed_ms": (busy - together(link, compute)) / 1e3,
        "priority_kernels": len(of("priority")),
        "combines": len(combines),
        "combines_beside_compute": sum(together([span], compute) > 0 for span in combines),
        "priority_ms": sum(end - begin for begin, end in union(of("priority"))) / 1e3,
        "priority_beside_compute_ms": together(of("priority"), compute) / 1e3,
        "spans": spans,
    }
    if side_streams is not None:
        priorities = {stream.priority for stream in side_streams._streams}
        assert max(priorities) < lanes["compute"].priority, f"priorities {priorities}"
        names = sorted({name for _, _, name in spans["priority 0"]})
        assert combines, f"no combine ran on a high-priority stream; there ran {names}"
        elsewhere = [name for _, _, name in spans["compute"] if "::combine " in name]
        assert not elsewhere, "the stage's last combine ran on the compute stream too"
    print(
        f"profiled, {mode}: links busy {result['link_ms']:.1f} ms, of that"
        f" {result['exposed_ms']:.2f} ms without a compute kernel; priority streams"
        f" {result['priority_ms']:.2f} ms in {result['priority_kernels']} kernels, of that"
        f" {result['priority_beside_compute_ms']:.2f} ms beside compute;"
        f" {result['combines_beside_compute']} of {result['combines']} combines beside compute"
    )
    return result


def draw(profiles: dict[str, Any], path: Path) -> None:
    """The timelines of the profiled steps, one under the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"compute": "tab:blue", "priority": "tab:red", "link": "tab:green"}
    figure, axes = pyplot.subplots(len(profiles), figsize=(16, 4 * len(profiles)), sharex=True)
    for axis, (mode, result) in zip(
        [axes] if len(profiles) == 1 else axes, profiles.items(), strict=True
    ):
        lanes = result["spans"]
        start = min(begin for found in lanes.values() for begin, _, _ in found)
        for row, (lane, found) in enumerate(reversed(lanes.items())):
            bars = [((begin - start) / 1e3, (end - begin) / 1e3) for begin, end, _ in found]
            axis.broken_barh(bars, (row - 0.4, 0.8), color=colours[lane.split()[0]])
        axis.set_yticks(range(len(lanes)), list(reversed(lanes)))
        axis.set_title(f"{mode}: one step")
    axis.set_xlabel("ms")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def train_equal(stage: Stage, options: argparse.Namespace) -> None:
    """Parameters and what is sent, bit by bit, after steps in each order over jittering links."""
    start = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    ended: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        pace = Pace(options.gigabytes, options.latency_us, jitter_ms=1.0)
        stage.choose(mode, pace)
        with torch.no_grad():
            for name, parameter in stage.model.named_parameters():
                parameter.copy_(start[name])
        for _ in range(options.equal):
            stage.step()
            with torch.no_grad():
                for parameter in stage.model.parameters():
                    # as far for a large gradient as for a small one: the loss has no bound
                    size = parameter.grad.abs().mean().clamp_min(1e-30)
                    parameter -= 1e-4 * parameter.grad / size
        torch.cuda.synchronize()
        ended[mode] = {n: p.detach().cpu().clone() for n, p in stage.model.named_parameters()} | {
            "sent forward": stage.neighbours.to_next.far.clone(),
            "sent backward": stage.neighbours.to_prev.far.clone(),
        }
    stock = ended.pop("stock order")
    for name, value in stock.items():
        assert value.isfinite().all(), f"{name} is not finite: nothing to compare"
    # a norm's weight of 1 in bf16 moves by steps of 1/256 alone
    moved = sum(not torch.equal(stock[name], value.cpu()) for name, value in start.items())
    assert moved > len(start) // 2, f"only {moved} of {len(start)} parameters moved"
    for mode, found in ended.items():
        other = [name for name, value in found.items() if not torch.equal(value, stock[name])]
        assert not other, f"{mode} differs from stock order in {other}"
        print(f"{mode}: {options.equal} steps, {len(found)} tensors as in stock order, bit for bit")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"layers": 4, "hidden": 4096, "ffn": 14336, "heads": 32, "groups": 8}
    pipeline = {"sequence": 4096, "batch": 1, "stages": 4, "stage": 1, "microbatches": 12}
    for name, default in {**sizes, **pipeline, "steps": 4, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--gigabytes", type=float, default=25, help="10^9 bytes/s of a link")
    parser.add_argument("--latency-us", type=float, default=20, help="of a message")
    parser.add_argument("--neighbours", nargs="+", default=KINDS, choices=KINDS, help="see above")
    parser.add_argument("--equal", type=int, default=0, metavar="N", help="compare N steps instead")
    parser.add_argument("--recompute", help="layers a block, or auto: rebuild streams (off)")
    parser.add_argument("--spec", choices=("te", "local"), default="te", help="Megatron's layers")
    parser.add_argument("--out", type=Path, help="a folder for JSON, traces and the timeline")
    parser.add_argument("--cpu", action="store_true", help="rehearse without a GPU")
    options = parser.parse_args()
    if options.equal:
        # small kernels, much of the time at the ends
        small = {"hidden": 1024, "ffn": 2816, "heads": 16, "groups": 4, "sequence": 1024}
        for name, value in small.items():
            if getattr(options, name) == sizes.get(name, pipeline.get(name)):
                setattr(options, name, value)
        options.microbatches = min(options.microbatches, 6)
    return options


def main() -> None:
    """Measure, or compare."""
    options = parse()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29534")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    rank = int(os.environ.get("RANK", "0"))
    dist.init_process_group("gloo" if CPU and world > 1 else "nccl", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=world)
    names = ("layers", "hidden", "ffn", "heads", "groups", "sequence", "batch", "spec")
    sizes = Sizes(**{name: getattr(options, name) for name in names})
    sizes.stages, sizes.stage = (world, rank) if world > 1 else (options.stages, options.stage)
    recompute = options.recompute
    mhc = MHCConfig(
        overlap_p2p=True,
        backend="torch" if CPU else "triton",
        recompute=int(recompute) if recompute and recompute.isdecimal() else recompute,
    )
    if world > 1:
        real_links.measure(sizes, mhc, MODES, options)
        dist.destroy_process_group()
        return
    stage = Stage(sizes, mhc, options.microbatches)
    if options.equal:
        train_equal(stage, options)
    else:
        rows = measure(stage, options)
        if options.out and not CPU:
            options.out.mkdir(parents=True, exist_ok=True)
            stage.microbatches = min(stage.microbatches, 8)
            pace = Pace(options.gigabytes, options.latency_us, **rows["busy"])
            profiles = {mode: profile(stage, mode, pace, options.out) for mode in MODES}
            draw(profiles, options.out / "timeline.png")
            for mode, result in profiles.items():
                rows[f"profiled, {mode}"] = {k: v for k, v in result.items() if k != "spans"}
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "pipeline.json").write_text(json.dumps(rows, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
