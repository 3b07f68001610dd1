"""What a site's traffic costs by the piece of a token that is read at once, with nothing computed.

    python benchmarks/kernels/traffic.py                            # T 8192, C 4096
    python benchmarks/kernels/traffic.py --width 7168 --channels 64 128

A kernel reads x [T, 4, C] and f [T, C] and writes [T, 4, C], bf16: the 9 passes of
`projection.combine_and_project_kernel`, in its pattern. A program holds a block of channels and
goes through tokens: a share of its own, or every P-th tile (P = programs), next to what the others
read. us are medians over CUDA events, the L2 cache emptied before each run.
"""

import functools
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
import triton.language as tl
from triton.testing import do_bench

from benchmarks.common import command_line
from benchmarks.kernels.bandwidth import copy_bandwidth


@triton.jit
def pieces_kernel(
    x_ptr,
    f_ptr,
    y_ptr,
    T,
    share,
    N: tl.constexpr,
    C: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """y = x + f on one block of channels: `share` tokens, or every P-th tile of BT."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    if NEIGHBOURS:
        first, last, jump = tl.program_id(1) * BT, T, tl.num_programs(1) * BT
    else:
        first = tl.program_id(1) * share
        last, jump = tl.minimum(first + share, T), BT
    for t0 in range(first, last, jump):
        t = t0 + tl.arange(0, BT)
        mask = (t < last)[:, None] & (c < C)[None, :]
        t64 = t.to(tl.int64)[:, None]
        f = tl.load(f_ptr + t64 * C + c[None, :], mask)
        for i in tl.static_range(N):
            at = t64 * (N * C) + (i * C + c)[None, :]
            tl.store(y_ptr + at, tl.load(x_ptr + at, mask) + f, mask)


def run(
    x: torch.Tensor,
    f: torch.Tensor,
    y: torch.Tensor,
    *,
    channels: int,
    programs: int,
    tokens: int = 32,
    neighbours: bool = True,
) -> None:
    """Launch `pieces_kernel`: y = x + f for x [T, n, C], f [T, C].

    Args:
        channels, tokens: the tile, powers of two.
        programs: that share the tokens of one block of channels.
    """
    count, n, width = x.shape
    share = triton.cdiv(triton.cdiv(count, programs), tokens) * tokens
    grid = (triton.cdiv(width, channels), min(programs, triton.cdiv(count, tokens)))
    pieces_kernel[grid](
        x, f, y, count, share, N=n, C=width, NEIGHBOURS=neighbours, BT=tokens, BC=channels,
        num_warps=4, num_stages=1,
    )  # fmt: skip


def main() -> None:
    """Print a line for each block, number of programs and order of tokens."""
    parser = command_line.parser(__doc__)
    command_line.add_numbers(parser, command_line.SITE)
    command_line.add_list(parser, "channels", [32, 64, 128, 256], "of a block, powers of two")
    command_line.add_list(parser, "programs", [4, 8, 64], "that share the tokens of a block")
    arguments = command_line.parse_on_gpu(parser)
    tokens, width = arguments.tokens, arguments.width
    x = torch.randn(tokens, 4, width, device="cuda", dtype=torch.bfloat16)
    f, y = torch.randn_like(x[:, 0]), torch.empty_like(x)
    least = 9 * tokens * width * 2 / copy_bandwidth() * 1e6
    print(f"{torch.cuda.get_device_name()}: 9 passes of a copy are {least:.1f} us")
    for channels, programs in itertools.product(arguments.channels, arguments.programs):
        for neighbours in (False, True):
            call = functools.partial(
                run, x, f, y, channels=channels, programs=programs, neighbours=neighbours
            )
            took = do_bench(call, return_mode="median") * 1e3
            order = "neighbours" if neighbours else "own shares"
            print(f"{2 * channels:5} bytes, {programs:3} programs a block, {order}: {took:7.1f} us")


if __name__ == "__main__":
    main()
