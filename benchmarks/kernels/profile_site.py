"""One steady-state site forward and backward, each kernel once, for a profiler to watch.

    ncu --clock-control none --set full -k regex:combine_and_project_kernel \\
        python benchmarks/kernels/profile_site.py
    python benchmarks/kernels/profile_site.py --tiles combine_and_project=32,128,4,4,3 --width 7168

A tile is tokens,channels,splits,warps,stages and, where wanted, the register limit; kernels that
are not named keep theirs of `kernels.triton.tiles`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.common import command_line
from benchmarks.kernels.site_tiles import named_tile, subjects, use_tile


def main() -> None:
    """Launch every kernel of the site once, with the tiles of the command line."""
    parser = command_line.parser(__doc__)
    command_line.add_numbers(parser, command_line.SITE)
    parser.add_argument(
        "--tiles", nargs="*", default=[], type=named_tile, metavar="KERNEL=TOKENS,CHANNELS,...",
        help="tiles to run instead of kernels.triton.tiles's",
    )  # fmt: skip
    arguments = command_line.parse_on_gpu(parser)
    for kernel, numbers in arguments.tiles:
        use_tile(kernel, numbers)
    for call in subjects(arguments.tokens, arguments.width).values():
        call()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
