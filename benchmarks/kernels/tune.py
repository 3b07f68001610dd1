"""Time each kernel of a steady-state site over a list of tiles, beside the one that runs.

    python benchmarks/kernels/tune.py                       # all kernels, T 8192, C 4096, n 4
    python benchmarks/kernels/tune.py --width 3072 --save tiles.json
    MEGATRON_MHC_TILES=tiles.json torchrun ...              # trains with the fastest of them
    python benchmarks/kernels/tune.py --kernels combine_and_project --width 7168 --seconds 60
    python benchmarks/kernels/tune.py --tiles stream_gradients=8,64,13,2,3,255 coefficients=8,1,1,4
    python benchmarks/kernels/tune.py --streams 8           # n 8 has a list of its own
    python benchmarks/kernels/tune.py --single-pass         # in a site of convention deepseek_v4_1
    python benchmarks/kernels/tune.py --kernels combine combine_gradients rebuild    # in no site

Tiles are tokens,channels,splits,warps,stages and, where wanted, the register limit. A kernel is
timed where it runs, in a site forward and backward replayed as a CUDA graph: alone it may find in
the L2 cache what others push out (`coefficients` took 25 us alone and 97 in a site, C 7168). The
fastest tile is the one of the fastest site: it also decides what others have to add up. What no
such site has (the last site's combine, `rebuild` of eight boundaries) is timed alone. Passes are
T*C bf16 elements at the measured copy bandwidth. What is saved serves this GPU, n, C and dtype.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.common import command_line
from benchmarks.kernels.bandwidth import copy_bandwidth
from benchmarks.kernels.by_kernel import captured, kernel_times
from benchmarks.kernels.peers import Shapes, ours, single_pass
from benchmarks.kernels.site_tiles import (
    ALONE,
    GRIDS,
    KERNELS,
    NOT_IN_SINGLE_PASS,
    NOT_IN_TWO,
    grid,
    kernel_floors,
    named_tile,
    running,
    subjects,
    use_tile,
)
from megatron_mhc.kernels import TRITON_STREAMS
from megatron_mhc.kernels.triton import tiles

Numbers = tuple[int, ...]
"""A tile, as the command line has it."""
Grids = dict[str, list[Numbers]]
"""The tiles to try, by kernel."""


def save(file: Path, fastest: dict[str, Numbers], n: int, width: int) -> None:
    """Add the fastest tiles to a file that MEGATRON_MHC_TILES may name; others in it stay."""
    saved = json.loads(file.read_text()) if file.exists() else {}
    for kernel, numbers in fastest.items():
        saved[tiles.key(kernel, n, width, torch.bfloat16)] = numbers
    lines = (f"  {json.dumps(name)}: {json.dumps(saved[name])}" for name in sorted(saved))
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@functools.cache
def _calls(n: int, width: int) -> dict[str, Callable[[], object]]:
    """A process's own subjects: a token count compiles nothing, so a few tokens will do."""
    return subjects(64, width, n)


def compile_tile(n: int, width: int, named: tuple[str, Numbers]) -> tuple[str, Numbers]:
    """Put a tile into Triton's cache on disk; returns what it was given."""
    kernel, numbers = named
    default = getattr(tiles, kernel)
    use_tile(kernel, numbers)
    with contextlib.suppress(Exception):  # main reports it
        _calls(n, width)[kernel]()
    setattr(tiles, kernel, default)
    return named


def timer(shapes: Shapes, is_single: bool) -> Callable[[str], tuple[float, float]]:
    """A kernel's name -> us of a site both ways and of this kernel in it, with today's tiles.

    Of the kernels that are ALONE: us of an operation of its own.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # leaves live where the graph is captured
        site = (single_pass if is_single else ours)(shapes)
    torch.cuda.current_stream().wait_stream(side)
    alone = functools.cache(lambda: subjects(shapes.tokens, shapes.width, shapes.n))

    def both() -> None:
        site.forward()
        site.backward()

    def times_us(kernel: str) -> tuple[float, float]:
        call = alone()[kernel] if kernel in ALONE else both
        with torch.cuda.stream(side):
            call()  # raises what the capture would keep to itself
        replay = captured(call)
        if replay is None:
            raise RuntimeError("what runs with this tile cannot be captured")
        times = kernel_times(lambda _: replay(), 1)
        return sum(times.values()), times[KERNELS[kernel]]

    return times_us


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser(__doc__)
    command_line.add_numbers(parser, command_line.SITE)
    parser.add_argument(
        "--streams", type=int, default=4, choices=TRITON_STREAMS, help="n (default: 4)"
    )
    parser.add_argument(
        "--kernels", nargs="*", choices=list(GRIDS), metavar="KERNEL",
        help=f"of {', '.join(GRIDS)} (default: all of the site)",
    )  # fmt: skip
    parser.add_argument(
        "--single-pass", action="store_true", help="a site of combine_read, not of combine_pre"
    )
    parser.add_argument(
        "--tiles", nargs="*", default=[], type=named_tile, metavar="KERNEL=TOKENS,CHANNELS,...",
        help="these tiles alone, instead of a list of this script's",
    )  # fmt: skip
    parser.add_argument("--save", type=Path, metavar="FILE", help="add the fastest to this file")
    parser.add_argument("--processes", type=int, default=12, help="compile that many at a time")
    parser.add_argument("--seconds", type=float, default=240, help="stop starting tiles after this")
    return command_line.parse_on_gpu(parser)


def asked(options: argparse.Namespace) -> Grids:
    """The tiles of the command line; without any, what runs and this script's list."""
    if not options.tiles:
        absent = (*ALONE, *(NOT_IN_SINGLE_PASS if options.single_pass else NOT_IN_TWO))
        kernels = options.kernels or [kernel for kernel in GRIDS if kernel not in absent]
        n, width = options.streams, options.width
        return {k: list(dict.fromkeys([running(k, n, width), *grid(k, n)])) for k in kernels}
    grids: Grids = {}
    for kernel, numbers in options.tiles:
        grids.setdefault(kernel, []).append(numbers)
    return grids


def compile_all(grids: Grids, options: argparse.Namespace) -> Grids:
    """Compile every tile, in processes, for at most half the time; returns those that are ready.

    The first of every kernel come first: what runs is among them.
    """
    turns = itertools.zip_longest(*([(k, numbers) for numbers in grids[k]] for k in grids))
    everything = [named for turn in turns for named in turn if named]
    compiling = functools.partial(compile_tile, options.streams, options.width)
    end = time.monotonic() + options.seconds / 2
    ready: set[tuple[str, Numbers]] = set()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        compiled = pool.imap_unordered(compiling, everything)
        with contextlib.suppress(multiprocessing.TimeoutError):
            for _ in everything:
                ready.add(compiled.next(max(0.1, end - time.monotonic())))
    for kernel, numbers in everything:
        if (kernel, numbers) not in ready:
            print(f"{kernel}: no time left to compile {numbers}")
    return {
        kernel: [numbers for numbers in listed if (kernel, numbers) in ready]
        for kernel, listed in grids.items()
    }


def timed(
    kernel: str,
    listed: list[Numbers],
    times_us: Callable[[str], tuple[float, float]],
    seconds: float,
) -> Iterator[tuple[float, float, Numbers]]:
    """us of a site and of this kernel in it with each tile, until the time is up."""
    begun, default = time.monotonic(), getattr(tiles, kernel)
    for numbers in listed:
        if time.monotonic() - begun > seconds:
            print(f"{kernel}: out of time before {numbers}")
            break
        use_tile(kernel, numbers)
        try:
            yield (*times_us(kernel), numbers)
        except Exception as error:  # too much shared memory, or a tile Triton refuses
            print(f"{kernel} {numbers}: {type(error).__name__} {str(error)[:80]}")
    setattr(tiles, kernel, default)


def main() -> None:
    """Compile all tiles, time them, print the fastest of each kernel and save them if asked to."""
    options = parse()
    start = time.monotonic()
    grids = asked(options)
    grids = compile_all(grids, options)
    print(f"compiled for {time.monotonic() - start:.0f} s")
    one_pass = options.tokens * options.width * 2 / copy_bandwidth() * 1e6
    print(f"{torch.cuda.get_device_name()}: a pass is {one_pass:.2f} us")
    shapes = Shapes(options.tokens, options.width, options.streams)
    times_us = timer(shapes, options.single_pass)
    fastest: dict[str, Numbers] = {}
    for kernel, listed in grids.items():
        results = sorted(timed(kernel, listed, times_us, options.seconds / len(grids)))
        if results:
            fastest[kernel] = results[0][2]
        print(f"{kernel}: floor {kernel_floors(options.streams)[kernel]} passes")
        for site_us, time_us, numbers in results[:12]:
            mark = (
                "  (what runs)"
                if numbers == running(kernel, options.streams, options.width)
                else ""
            )
            passes = f"{time_us / one_pass:6.2f} passes"
            print(f"  {time_us:8.1f} us {passes}, in all {site_us:8.1f} us  {numbers}{mark}")
    if options.save:
        save(options.save, fastest, options.streams, options.width)
        print(f"saved to {options.save}: {', '.join(fastest)}")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
