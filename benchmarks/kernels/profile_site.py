"""One steady-state site forward and backward, each kernel once, for a profiler to watch.

    ncu --clock-control none --set full -k regex:project_kernel \\
        python benchmarks/kernels/profile_site.py
    python benchmarks/kernels/profile_site.py --tiles project=32,128,4,4,3 --width 7168

A tile is tokens,channels,splits,warps,stages and, where wanted, the register limit; kernels that
are not named keep theirs of `kernels.triton.tiles`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.kernels.tune import named_tile, subjects, use_tile


def main() -> None:
    """Launch every kernel of the site once, with the tiles of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="T (default: %(default)s)")
    parser.add_argument("--width", type=int, default=4096, help="C (default: %(default)s)")
    parser.add_argument(
        "--tiles", nargs="*", default=[], type=named_tile, metavar="KERNEL=TOKENS,CHANNELS,...",
        help="tiles to run instead of kernels.triton.tiles's",
    )  # fmt: skip
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "a CUDA device is needed\n")
    for kernel, numbers in arguments.tiles:
        use_tile(kernel, numbers)
    for call in subjects(arguments.tokens, arguments.width).values():
        call()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
