"""Time one mHC site, forward and forward+backward, in ours and every installed peer.

    python benchmarks/kernels/sites.py                                  # everything, some minutes
    python benchmarks/kernels/sites.py --quick                          # T 8192, C 4096 alone
    python benchmarks/kernels/sites.py --tokens 4096 --widths 2560 7168 --peers ours TileKernels
    python benchmarks/kernels/sites.py --quick --peers ours "ours, deepseek_v4_1"
    python benchmarks/kernels/sites.py --quick --streams 1 2 8 --dtypes bf16 fp16 fp32
    python benchmarks/kernels/sites.py --operations                     # each operation alone
    python benchmarks/kernels/sites.py --quick --by-kernel --peers ours # each CUDA kernel of a site

A site of ours is `combine_pre`, the boundary between two sites, and its backward with all parameter
gradients; a peer's is its pre, F the identity, its post, and their backward. "ours, deepseek_v4_1"
is `combine_read`, that boundary in the single pass of delayed sites: another function, in 10 passes
and 25 at n = 4. Everything runs in one process on the same shapes, with fp32 parameters and 20
Sinkhorn iterations; not every peer has kernels for every n and dtype.

Columns: microseconds (medians over CUDA events; of a CUDA graph's replays where the peer can be
captured, else of plain launches, marked *); passes, that is T*C elements of the streams' dtype at
the bandwidth of a device-to-device copy measured in the same run; the share of that bandwidth that
the site would need for the fewest bytes of any known algorithm (`sites_plot.floors`); saved, the
memory that the forward leaves for the backward beside its inputs and results; peak, beside the
inputs; host, the time in which the host queues both ways, launched plainly; took, seconds with what
the implementation compiles and tunes for this size.
Buffers rotate so that no run finds its inputs in the L2 cache.
"""

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.common import command_line
from benchmarks.common.timing import host_us, median_us
from benchmarks.kernels.bandwidth import copy_bandwidth
from benchmarks.kernels.by_kernel import captured, kernel_times
from benchmarks.kernels.peers import PEERS, Shapes, Site
from benchmarks.kernels.sites_plot import SINGLE_PASS, floors, plot
from megatron_mhc import kernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
L2_BYTES = 64 * 2**20


def memory(site: Site) -> tuple[int, int]:
    """Bytes that the forward saves beside its results, and the peak of both ways."""
    site.forward()
    site.backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = site.forward()
    saved = torch.cuda.memory_allocated() - before - sum(r.nbytes for r in results)
    del results
    site.backward()
    return saved, torch.cuda.max_memory_allocated() - before


def measure(
    build: Callable[[Shapes], Site], shapes: Shapes, by_kernel: bool = False
) -> dict[str, Any]:
    """Times and memory of one implementation at one size, and of each kernel where asked for."""
    bytes_a_set = shapes.dtype.itemsize * shapes.tokens * shapes.n * shapes.width
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # leaves live where the graphs are captured
        sites = [build(shapes) for _ in range(1 + -(-2 * L2_BYTES // bytes_a_set))]
        saved, peak = memory(sites[0])
    torch.cuda.current_stream().wait_stream(side)

    def both(site: Site) -> None:
        site.forward()
        site.backward()

    result: dict[str, Any] = {"saved_bytes": saved, "peak_bytes": peak}
    with torch.cuda.stream(side):
        result["host_us"] = host_us(lambda: both(sites[0]))
    torch.cuda.current_stream().wait_stream(side)
    for name, step in (("forward", Site.forward), ("both", both)):
        replays = [captured(lambda site=site, step=step: step(site)) for site in sites]
        result[f"{name}_graph"] = all(replay is not None for replay in replays)
        if result[f"{name}_graph"]:
            run = lambda i, r=replays: r[i]()  # noqa: E731
        else:
            run = lambda i, s=step: s(sites[i])  # noqa: E731
        result[f"{name}_us"] = median_us(run, len(sites))
        if by_kernel:
            result[f"{name}_kernels_us"] = kernel_times(run, len(sites))
        for site in sites:
            site.results = ()
        del replays, run
    return result


def compare(arguments: argparse.Namespace, bandwidth: float) -> list[dict[str, Any]]:
    """The table of all peers at all sizes; stops starting new ones when the time is up."""
    rows = []
    begun = time.monotonic()
    print(
        f"{'T':>6} {'C':>5} {'n':>2} type  {'implementation':30} {'fwd us':>9} {'passes':>7}"
        f" {'share':>6} {'both us':>9} {'passes':>7} {'share':>6} {'host us':>8} {'saved MB':>9}"
        f" {'peak MB':>8} {'took':>5}"
    )
    axes = arguments.dtypes, arguments.streams, arguments.widths, arguments.tokens
    for dtype, n, width, tokens in itertools.product(*axes):
        shapes = Shapes(tokens, width, n, DTYPES[dtype])
        one_pass = tokens * width * shapes.dtype.itemsize / bandwidth * 1e6
        size = f"{tokens:6} {width:5} {n:2} {dtype}"
        for name in arguments.peers:
            row: dict[str, Any] = {"tokens": tokens, "width": width, "streams": n, "dtype": dtype}
            row["name"] = name
            rows.append(row)
            row_begun = time.monotonic()
            if row_begun - begun > arguments.seconds:
                row["error"] = "not run: out of time"
            else:
                try:
                    row.update(measure(PEERS[name], shapes, arguments.by_kernel))
                except (ImportError, OSError) as error:
                    row["error"] = f"not installed: {error}"
                except Exception as error:
                    row["error"] = f"failed: {type(error).__name__}: {error}"
            gc.collect()
            torch.cuda.empty_cache()
            if "error" in row:
                print(f"{size}  {name:30} {row['error'][:80]}")
                continue
            line = f"{size}  {name:30}"
            for part, floor in floors(n, name).items():
                row[f"{part}_passes"] = row[f"{part}_us"] / one_pass
                mark = " " if row[f"{part}_graph"] else "*"
                share = floor / row[f"{part}_passes"]
                line += f" {row[f'{part}_us']:8.0f}{mark} {row[f'{part}_passes']:7.1f} {share:6.0%}"
            row["seconds"] = time.monotonic() - row_begun
            line += f" {row['host_us']:8.0f}"
            line += f" {row['saved_bytes'] / 1e6:9.1f} {row['peak_bytes'] / 1e6:8.0f}"
            print(f"{line} {row['seconds']:5.0f}", flush=True)
            if arguments.by_kernel:
                for part in ("forward", "both"):
                    print_kernels(part, row[f"{part}_kernels_us"], one_pass)
    return rows


def print_kernels(part: str, times: dict[str, float], one_pass: float) -> None:
    """A line a kernel."""
    for name, time_us in times.items():
        print(f"{part:>20} {time_us:9.1f} us {time_us / one_pass:6.2f} passes  {name[:90]}")


def operations(tokens: int, width: int, bandwidth: float) -> list[dict[str, Any]]:
    """Each operation of ours alone, forward and both ways, against the passes it must move."""
    shapes = Shapes(tokens, width)
    x, (phi, alpha, bias) = shapes.streams(), shapes.parameters()
    n, f = shapes.n, shapes.normal(tokens, width).bfloat16()
    h_pre = torch.rand(tokens, n, device="cuda")
    h_post, h_res = 2 * h_pre, torch.softmax(shapes.normal(tokens, n, n), -1)
    fn, scale, base = phi[:n].clone(), alpha[:1].clone(), bias[:n].clone()
    small = 4 * n * n / (2 * width)  # an n x n matrix of fp32 a token, in passes
    cases: dict[str, tuple[tuple[torch.Tensor, ...], float, float]] = {
        "sinkhorn": ((shapes.normal(tokens, n, n),), 2 * small, 5 * small),
        "coefficients": ((x, phi, alpha, bias), n, n + 2 * n),
        "aggregate": ((x, h_pre), n + 1, n + 1 + 2 * n + 1),
        "pre": ((x, phi, alpha, bias), 2 * n + 1, 2 * n + 1 + (n + 1) + (2 * n + 1)),
        "combine": ((x, f, h_post, h_res), 2 * n + 1, 2 * n + 1 + 3 * n + 2),
        "combine_pre": ((x, f, h_post, h_res, phi, alpha, bias), *floors(n).values()),
        "combine_read": (
            (x, f, h_post, h_res, h_pre, phi, alpha, bias),
            *floors(n, SINGLE_PASS).values(),
        ),
        "head": ((x, fn, scale, base), 2 * n + 1, 2 * n + 1 + (n + 1) + (2 * n + 1)),
    }
    one_pass = tokens * width * 2 / bandwidth * 1e6
    rows = []
    print(f"{'operation':14} {'fwd us':>8} {'passes':>7} {'floor':>6} {'both us':>9} {'passes':>7}")
    for name, (arguments, floor, floor_both) in cases.items():

        def build(_: Shapes, name: str = name, arguments: tuple = arguments) -> Site:
            leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in arguments)
            call = getattr(kernels, name)

            def function() -> tuple[torch.Tensor, ...]:
                out = call(*leaves, backend="triton")
                return out if isinstance(out, tuple) else (out,)

            with torch.no_grad():
                gradients = tuple(torch.randn_like(result) for result in function())
            return Site(function, leaves, gradients)

        row = {"operation": name, "tokens": tokens, "width": width, **measure(build, shapes)}
        row |= {"forward_floor": floor, "both_floor": floor_both}
        rows.append(row)
        print(
            f"{name:14} {row['forward_us']:8.1f} {row['forward_us'] / one_pass:7.2f} {floor:6.2f}"
            f" {row['both_us']:9.1f} {row['both_us'] / one_pass:7.2f} {floor_both:6.2f}"
        )
        torch.cuda.empty_cache()
    return rows


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser(__doc__)
    command_line.add_list(parser, "tokens", [1024, 4096, 8192, 16384], "T, tokens of a site")
    command_line.add_list(parser, "widths", [4096, 2560, 7168], "C, the width of a stream")
    command_line.add_list(parser, "streams", [4], "n")
    parser.add_argument(
        "--dtypes", nargs="*", default=["bf16"], choices=list(DTYPES), help="(default: bf16)"
    )
    parser.add_argument(
        "--peers", nargs="*", default=list(PEERS), choices=list(PEERS), metavar="PEER",
        help=f"of {', '.join(map(repr, PEERS))} (default: all that are installed)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="T 8192, C 4096 alone")
    parser.add_argument("--operations", action="store_true", help="our operations alone as well")
    parser.add_argument("--by-kernel", action="store_true", help="times of a site's CUDA kernels")
    parser.add_argument("--seconds", type=float, default=420, help="start nothing new after this")
    parser.add_argument("--output", type=Path, default=Path("kernels"), help="stem of JSON and PNG")
    arguments = command_line.parse_on_gpu(parser)
    if arguments.quick:
        arguments.tokens, arguments.widths = [8192], [4096]
    return arguments


def main() -> None:
    """Measure operations if asked to, then sites; print tables, write JSON and a picture."""
    arguments = parse()
    bandwidth = copy_bandwidth()
    import triton

    machine = torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"a device-to-device copy moves {bandwidth / 1e12:.2f} TB/s")
    report: dict[str, Any] = {"machine": machine, "bandwidth": bandwidth}
    if arguments.operations:
        size = (arguments.tokens[0], arguments.widths[0])
        report["operations"] = operations(*size, bandwidth)
    report["sites"] = compare(arguments, bandwidth)
    arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1))
    plot(report["sites"], machine, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
