"""Time each kernel of a steady-state site over a list of tiles, beside the one that runs.

    python benchmarks/kernels/tune.py                       # all kernels, T 8192, C 4096, n 4
    python benchmarks/kernels/tune.py --width 3072 --save tiles.json
    MEGATRON_MHC_TILES=tiles.json torchrun ...              # trains with the fastest of them
    python benchmarks/kernels/tune.py --kernels project --width 7168 --seconds 60
    python benchmarks/kernels/tune.py --tiles streams_backward=8,64,13,2,3,255 finish=8,1,1,4

Tiles are tokens,channels,splits,warps,stages and, where wanted, the register limit. A kernel is
timed where it runs, in a site forward and backward replayed as a CUDA graph: alone it may find in
the L2 cache what others push out (`finish` took 25 us alone and 97 in a site, C 7168). The fastest
tile is the one of the fastest site: it also decides what others have to add up. Passes are
T*C bf16 elements at the measured copy bandwidth. What is saved serves this GPU, n, C and dtype.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.kernels.bandwidth import copy_bandwidth
from benchmarks.kernels.by_kernel import captured, kernel_times
from benchmarks.kernels.peers import Shapes, ours
from megatron_mhc.kernels.arguments import DEFAULT, Mixing
from megatron_mhc.kernels.triton import tiles
from megatron_mhc.kernels.triton.aggregate import weighted_sum
from megatron_mhc.kernels.triton.passes.finish import finish
from megatron_mhc.kernels.triton.passes.phi_gradient import phi_gradient
from megatron_mhc.kernels.triton.passes.projection import project
from megatron_mhc.kernels.triton.passes.stream_gradients import streams_gradients
from megatron_mhc.kernels.triton.passes.token_gradients import coefficients_gradients

FLOORS = {
    "project": 9,
    "finish": 0,
    "aggregate": 5,
    "coefficients_backward": 5,
    "streams_backward": 19,
    "phi_gradient": 4,
}
"""Passes that each kernel must move at n = 4, partial sums left out."""
KERNELS = {"streams_backward": "streams_kernel", "phi_gradient": "phi_kernel"}
KERNELS |= {"coefficients_backward": "coefficients_kernel"}
"""What the GPU calls a kernel, where it is another name than NAME_kernel."""
GRIDS: dict[str, list[tuple[int, ...]]] = {
    "project": [
        *itertools.product((32,), (128,), (2, 3, 4, 6, 13), (4,), (3,)),
        *itertools.product((32, 64), (64,), (2, 4, 8), (4,), (3,)),
    ],
    "finish": [(tokens, 1, 1, warps, 2) for tokens in (4, 8, 16) for warps in (1, 2, 4)],
    "aggregate": [
        *itertools.product((1, 2, 4, 8), (512, 1024), (1,), (4,), (1,)),
        *itertools.product((4, 8), (256, 512), (1,), (8,), (1,)),
    ],
    "coefficients_backward": [
        *itertools.product((8, 16, 32), (64, 128), (1,), (4,), (1, 2)),
        *itertools.product((8, 16), (256, 512), (1,), (8,), (2,)),
    ],
    "streams_backward": [
        *itertools.product((8,), (64,), (4, 8, 16), (2,), (1, 3), (255,)),
        *itertools.product((16,), (32,), (4, 8), (2,), (3,), (255,)),
        *itertools.product((8,), (128,), (8,), (4,), (3,), (255,)),
    ],
    "phi_gradient": list(itertools.product((32, 64), (64, 128), (5, 8), (4,), (2, 3, 4))),
}


def named_tile(text: str) -> tuple[str, tuple[int, ...]]:
    """`KERNEL=tokens,channels,...` as a kernel's name and a tile's numbers.

    Raises:
        argparse.ArgumentTypeError: no such kernel, or no such tile.
    """
    kernel, _, listed = text.partition("=")
    if kernel not in GRIDS:
        raise argparse.ArgumentTypeError(f"{text!r} names none of the kernels {', '.join(GRIDS)}")
    numbers = listed.split(",")
    if not (2 <= len(numbers) <= 6 and all(number.isdecimal() for number in numbers)):
        raise argparse.ArgumentTypeError(
            f"{listed!r} is no tile: give tokens,channels[,splits[,warps[,stages[,registers]]]]"
        )
    return kernel, tuple(map(int, numbers))


def running(kernel: str, width: int) -> tuple[int, ...]:
    """The tile of `kernels.triton.tiles`, for n = 4 and bf16, as `--tiles` takes it."""
    tile = dataclasses.astuple(getattr(tiles, kernel)(4, width, torch.bfloat16))
    return tile[:-1] if tile[-1] is None else tile


def use_tile(kernel: str, numbers: tuple[int, ...]) -> None:
    """Have every later launch of a kernel in this process run with this tile."""
    tile = tiles.Tile(*numbers)
    setattr(tiles, kernel, lambda *_: tile)


def save(file: Path, fastest: dict[str, tuple[int, ...]], width: int) -> None:
    """Add the fastest tiles to a file that MEGATRON_MHC_TILES may name; others in it stay."""
    saved = json.loads(file.read_text()) if file.exists() else {}
    for kernel, numbers in fastest.items():
        saved[tiles.key(kernel, 4, width, torch.bfloat16)] = numbers
    lines = (f"  {json.dumps(name)}: {json.dumps(saved[name])}" for name in sorted(saved))
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def subjects(tokens: int, width: int, n: int = 4) -> dict[str, Callable[[], object]]:
    """The kernels with their small companions, as closures over one site's tensors."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    rows = n * n + 2 * n
    x, dy = normal(tokens, n, width).bfloat16(), normal(tokens, n, width).bfloat16()
    f, du = normal(tokens, width).bfloat16(), normal(tokens, width).bfloat16()
    h_post = 2 * torch.sigmoid(normal(tokens, n))
    h_res = torch.softmax(normal(tokens, n, n), -1)
    phi, bias = normal(rows, n * width) * 0.02, normal(rows)
    alpha = torch.full((3,), 0.5, device="cuda")
    mixing = Mixing(f, h_post, h_res)
    y, partial = project(x, phi, mixing)
    done = finish(y, partial, alpha, bias, DEFAULT, aggregate=True)
    small = {"d_post": normal(tokens, n), "d_res": normal(tokens, n, n)}
    token_args = (y, done.normed, done.inverse, alpha, bias, DEFAULT)
    token = coefficients_gradients(*token_args, du=du, **small)

    return {
        "project": lambda: project(x, phi, mixing),
        "finish": lambda: finish(y, partial, alpha, bias, DEFAULT, aggregate=False),
        "aggregate": lambda: weighted_sum(y, done.h_pre),
        "coefficients_backward": lambda: coefficients_gradients(*token_args, du=du, **small),
        "streams_backward": lambda: streams_gradients(
            y, dy=dy, du=du, phi=phi, token=token, x=x, mixing=mixing
        ),
        "phi_gradient": lambda: phi_gradient(y, token.d_z),
    }


def compile_tiles(width: int, listed: list[tuple[str, tuple[int, ...]]]) -> None:
    """Fill Triton's cache on disk: a token count compiles nothing, so a few tokens will do."""
    calls = subjects(64, width)
    for kernel, numbers in listed:
        default = getattr(tiles, kernel)
        use_tile(kernel, numbers)
        with contextlib.suppress(Exception):  # main reports it
            calls[kernel]()
        setattr(tiles, kernel, default)


def in_site(tokens: int, width: int) -> Callable[[str], tuple[float, float]]:
    """A kernel's name -> us of a site both ways and of this kernel in it, with today's tiles."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # leaves live where the graph is captured
        site = ours(Shapes(tokens, width))
    torch.cuda.current_stream().wait_stream(side)

    def both() -> None:
        site.forward()
        site.backward()

    def times_us(kernel: str) -> tuple[float, float]:
        with torch.cuda.stream(side):
            both()  # raises what the capture would keep to itself
        replay = captured(both)
        if replay is None:
            raise RuntimeError("a site with this tile cannot be captured")
        times = kernel_times(lambda _: replay(), 1)
        return sum(times.values()), times[KERNELS.get(kernel, f"{kernel}_kernel")]

    return times_us


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--kernels", nargs="*", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument(
        "--tiles", nargs="*", default=[], type=named_tile, metavar="KERNEL=TOKENS,CHANNELS,...",
        help="these tiles alone, instead of a list of this script's",
    )  # fmt: skip
    parser.add_argument("--save", type=Path, metavar="FILE", help="add the fastest to this file")
    parser.add_argument("--processes", type=int, default=12, help="compile that many at a time")
    parser.add_argument("--seconds", type=float, default=240, help="stop starting tiles after this")
    arguments = parser.parse_args()
    grids = {
        kernel: list(dict.fromkeys([running(kernel, arguments.width), *GRIDS[kernel]]))
        for kernel in arguments.kernels
    }
    if arguments.tiles:
        grids = {}
        for kernel, numbers in arguments.tiles:
            grids.setdefault(kernel, []).append(numbers)
    start = time.monotonic()
    everything = [(kernel, numbers) for kernel, grid in grids.items() for numbers in grid]
    spawn = multiprocessing.get_context("spawn")
    workers = [
        spawn.Process(
            target=compile_tiles,
            args=(
                arguments.width,
                everything[i :: arguments.processes],
            ),
        )
        for i in range(arguments.processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(arguments.seconds / 2)
    print(f"compiled for {time.monotonic() - start:.0f} s")
    one_pass = arguments.tokens * arguments.width * 2 / copy_bandwidth() * 1e6
    print(f"{torch.cuda.get_device_name()}: a pass is {one_pass:.2f} us")
    times_us = in_site(arguments.tokens, arguments.width)
    fastest: dict[str, tuple[int, ...]] = {}
    for kernel, grid in grids.items():
        results, default = [], getattr(tiles, kernel)
        share = arguments.seconds / len(grids)
        begun = time.monotonic()
        for numbers in grid:
            if time.monotonic() - begun > share:
                print(f"{kernel}: out of time before {numbers}")
                break
            use_tile(kernel, numbers)
            try:
                results.append((*times_us(kernel), numbers))
            except Exception as error:  # too much shared memory, or a tile Triton refuses
                print(f"{kernel} {numbers}: {type(error).__name__} {str(error)[:80]}")
        setattr(tiles, kernel, default)
        results.sort()
        if results:
            fastest[kernel] = results[0][2]
        print(f"{kernel}: floor {FLOORS[kernel]} passes")
        for site_us, time_us, numbers in results[:12]:
            mark = "  (what runs)" if numbers == running(kernel, arguments.width) else ""
            passes = f"{time_us / one_pass:6.2f} passes"
            print(f"  {time_us:8.1f} us {passes}, site {site_us:8.1f} us  {numbers}{mark}")
    if arguments.save:
        save(arguments.save, fastest, arguments.width)
        print(f"saved to {arguments.save}: {', '.join(fastest)}")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
