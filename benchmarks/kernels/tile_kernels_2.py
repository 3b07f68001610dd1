"""Time what TileKernels 2.1.0 has of an mHC site, piece by piece, beside our own operations.

    python benchmarks/kernels/tile_kernels_2.py                               # some minutes
    python benchmarks/kernels/tile_kernels_2.py --widths 4096 --pieces post "post, backward"

2.1.0 leaves the projection, its backward and autograd to the caller, so it has no whole site. Each
piece is called through its wrapper, with n 4, bf16 streams, fp32 coefficients, 20 Sinkhorn
iterations and a projection in one part; its first call compiles it. A row names what of ours does
the same; a piece without such a name is inside larger kernels of ours. "coefficients" is norm,
split and sinkhorn, one behind the other; "fused" is these and apply in one kernel. Not quite the
same: "apply, backward" adds to a gradient that it reads (3n + 1 passes; ours writes a new one,
2n + 1), and ours begins "coefficients" and "fused" with as many parts as its own projection leaves.

Columns: microseconds, medians of CUDA graphs' replays (plain launches: *); passes, that is T*C
elements of bf16 at the bandwidth of a device-to-device copy measured in the same run; differs, the
largest difference of TileKernels' results from ours (where nothing is ours, from PyTorch's) over
the largest value. Sets of buffers rotate so that no streams are found in the L2 cache; coefficients
alone may be, as in a site.
"""

import gc
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.common import command_line
from benchmarks.common.timing import median_us
from benchmarks.kernels.bandwidth import copy_bandwidth
from benchmarks.kernels.by_kernel import captured
from benchmarks.kernels.peers import Shapes
from benchmarks.kernels.sites import L2_BYTES
from benchmarks.kernels.tile_kernels_2_pieces import (
    Buffers,
    Piece,
    Tensors,
    around,
    backward,
    forward,
    recompute,
)


def difference(results: Tensors, expected: Tensors) -> float:
    """The largest of all pairs, over the largest value of a pair's second."""
    pairs = zip(results, expected, strict=True)
    of_pairs = [(a.reshape(b.shape).float() - b).abs().max() / b.abs().max() for a, b in pairs]
    return torch.stack([one.float() for one in of_pairs]).max().item()


def timed(steps: list[Callable[[], Any]], one_pass: float) -> list[str]:
    """Microseconds and passes of the steps, each on buffers of its own."""
    replays = [captured(step) for step in steps]
    graphs = [replay for replay in replays if replay is not None]
    runs = graphs if len(graphs) == len(steps) else steps
    time_us = median_us(lambda i: runs[i](), len(runs))
    return [f"{time_us:.1f}{'' if runs is graphs else '*'}", f"{time_us / one_pass:.2f}"]


def row(copies: Sequence[Piece], one_pass: float) -> list[str]:
    """The cells of a piece, from its copies on different buffers; or its error."""
    piece, cells = copies[0], ["", "", copies[0].operation, "", "", ""]
    try:
        results = piece.theirs()  # compiles it
        own = None if piece.ours is None else piece.ours()
        cells[5] = f"{difference(results, piece.expected(own)):.1e}"
        del results, own
        cells[:2] = timed([copy.theirs for copy in copies], one_pass)
        own_steps = [copy.ours for copy in copies if copy.ours is not None]
        if own_steps:
            cells[3:5] = timed(own_steps, one_pass)
    except Exception as error:
        cells[5] += f" {type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
    return cells


def measure(shapes: Shapes, bandwidth: float, names: list[str] | None, until: float) -> None:
    """Print the rows of one size."""
    one_pass = shapes.tokens * shapes.width * 2 / bandwidth * 1e6
    streams = shapes.tokens * shapes.n * shapes.width * 2
    sets = [Buffers(shapes) for _ in range(1 + -(-2 * L2_BYTES // streams))]
    for group in (forward, backward, around, recompute):
        try:
            pieces = list(zip(*map(group, sets), strict=True))
        except Exception as error:
            print(f"| {shapes.tokens} | {shapes.width} | {group.__name__} | {error} |" + " |" * 5)
            continue
        for copies in pieces:
            name = copies[0].name
            if (names and name not in names) or time.monotonic() > until:
                continue
            cells = " | ".join(row(copies, one_pass))
            print(f"| {shapes.tokens} | {shapes.width} | {name} | {cells} |", flush=True)
        del pieces, copies
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    """Print the table."""
    parser = command_line.parser(__doc__)
    command_line.add_list(parser, "tokens", [8192], "T, tokens of a site")
    command_line.add_list(parser, "widths", [4096, 2560, 7168], "C, the width of a stream")
    parser.add_argument("--pieces", nargs="*", metavar="NAME", help="of the table (default: all)")
    parser.add_argument("--seconds", type=float, default=420, help="start no piece after this")
    options = command_line.parse_on_gpu(parser)
    until = time.monotonic() + options.seconds
    theirs, bandwidth = importlib.import_module("tile_kernels").__version__, copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, TileKernels {theirs}")
    print(f"a device-to-device copy moves {bandwidth / 1e12:.2f} TB/s\n")
    print("| T | C | piece | TileKernels us | passes | ours | us | passes | differs |")
    print("| --- " * 9 + "|")
    for width, tokens in itertools.product(options.widths, options.tokens):
        measure(Shapes(tokens, width), bandwidth, options.pieces, until)


if __name__ == "__main__":
    main()
