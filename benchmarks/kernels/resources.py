"""What each kernel takes of a card: registers, spills, shared memory; compiled without the card.

    python benchmarks/kernels/resources.py
    python benchmarks/kernels/resources.py --cards H100 --width 7168 --dtype fp32

The tiles are those that the card gets. `stack` is local memory of a thread: 0 means that nothing
is spilled. `programs` is how many fit a multiprocessor, by its registers and shared memory.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import command_line

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
OPERATIONS = ("combine_pre", "pre", "combine", "aggregate", "head", "sinkhorn", "rebuild")
REGISTERS = 65_536
"""Of a multiprocessor, of every card here."""
RESERVED = 1024
"""Bytes of shared memory that CUDA keeps of a program."""


class Kernel(NamedTuple):
    """A compiled kernel: its name, threads, registers and bytes of stack of a thread, and bytes of
    shared memory of a program."""

    name: str
    threads: int
    registers: int
    stack: int
    shared: int

    def programs(self, shared_memory: int) -> int:
        """How many fit a multiprocessor that has so much shared memory."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * self.threads)
        return min(by_registers, (shared_memory + RESERVED) // (self.shared + RESERVED), 32)


def usage(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as `cuobjdump` says."""
    from triton.backends.nvidia import __file__ as nvidia

    tool = Path(nvidia).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def compiled(card: str, n: int, width: int, dtype: str) -> list[Kernel]:
    """All kernels of the operations, as this card runs them; the largest of each name."""
    import torch

    from megatron_mhc.kernels.triton import launch
    from tests.triton_driver import call, use_card

    found: dict[str, Kernel] = {}
    through_triton = launch.through_triton

    def keep(kernel: Any, grid: Any, arguments: Any, constants: Any) -> Any:
        made = kernel[grid](*arguments, **constants)
        of = made.metadata
        one = Kernel(of.name, 32 * of.num_warps, *usage(made.asm["cubin"]), of.shared)
        if of.name not in found or one[2:] > found[of.name][2:]:
            found[of.name] = one
        return through_triton(kernel, grid, arguments, constants)

    launch.through_triton = keep
    use_card(card, setattr)
    for operation in OPERATIONS:
        call(operation, n, getattr(torch, DTYPES[dtype]), width)
    return sorted(found.values())


def main() -> None:
    """A table a card."""
    parser = command_line.parser(__doc__)
    from tests.kernel_cases import CARDS

    parser.add_argument("--cards", nargs="+", default=["A100", "L40S", "H100", "B200"],
                        choices=CARDS, metavar="CARD", help=f"of {', '.join(CARDS)}")  # fmt: skip
    parser.add_argument("--streams", type=int, default=4, help="n (default: 4)")
    parser.add_argument("--width", type=int, default=4096, help="C (default: 4096)")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of the streams")
    options = parser.parse_args()
    for card in options.cards:
        print(f"{card}, n {options.streams}, C {options.width}, {options.dtype}")
        print(
            f"{'kernel':34}{'threads':>8}{'registers':>10}{'stack':>7}{'shared':>9}{'programs':>10}"
        )
        for kernel in compiled(card, options.streams, options.width, options.dtype):
            name, threads, registers, stack, shared = kernel
            programs = kernel.programs(CARDS[card][1])
            print(
                f"{name:34}{threads:8}{registers:10}{stack:7}{shared:9,}{programs:10}", flush=True
            )


if __name__ == "__main__":
    main()
