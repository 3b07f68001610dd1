"""Tile sizes of the Triton kernels: fixed for (n, C, dtype) and a GPU, whatever the token count.

So the same inputs give the same bits in every batch (but those of `hc_coefficients`), and a new
token count compiles and tunes nothing. The numbers below suit an H100; docs/measured-facts.md says
what was measured.
`benchmarks/kernels/tune.py --save FILE` finds others, and MEGATRON_MHC_TILES=FILE uses them. A key
of the file names one tile: `combine_and_project sm_90 n4 C4096 bfloat16`.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ENVIRONMENT_VARIABLE = "MEGATRON_MHC_TILES"
TUNABLE: dict[str, Callable[[int, int, torch.dtype], "Tile"]] = {}
"""The kernels whose tiles a file may name."""


class Tile(NamedTuple):
    """What one program of a kernel works on.

    Attributes:
        tokens, channels: the tile that it goes through; powers of two, as warps are.
        splits: programs that share the tokens of one block of channels; of `combine`, each tile
            has its own; for `rebuild` it is the boundaries of a launch.
        warps, stages, registers: Triton's num_warps, num_stages and maxnreg.
    """

    tokens: int
    channels: int
    splits: int = 1
    warps: int = 4
    stages: int = 2
    registers: int | None = None


def key(kernel: str, n: int, width: int, dtype: torch.dtype) -> str:
    """What a file calls the tile of this kernel on the current GPU."""
    return f"{kernel} {architecture()} n{n} C{width} {str(dtype).removeprefix('torch.')}"


@functools.cache
def architecture() -> str:
    """Of the current CUDA device: `sm_90`; `cpu` where there is none. As with all that is asked of
    the device here, the first answer stands: a process's cards are taken to be alike."""
    if not torch.cuda.is_available():
        return "cpu"
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


@functools.cache
def multiprocessors() -> int:
    """Of the current CUDA device; an H100's where there is none."""
    if not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


@functools.cache
def shared_memory() -> int:
    """Bytes that a program may have on the current CUDA device; an H100's where there is none."""
    if not torch.cuda.is_available():
        return 232_448
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.shared_memory_per_block_optin


@functools.cache
def tuned() -> dict[str, Tile]:
    """The tiles of the file that MEGATRON_MHC_TILES names; none where it names none.

    Raises:
        ValueError: the file cannot be read, names no such kernel, or has something else than a
            tile: tokens, channels[, splits[, warps[, stages[, registers]]]].
    """
    file = os.environ.get(ENVIRONMENT_VARIABLE)
    if not file:
        return {}
    try:
        listed = json.loads(Path(file).read_text())
        return {name: _tile(name, numbers) for name, numbers in listed.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}={file} is not what benchmarks/kernels/tune.py --save writes:"
            f" {error}"
        ) from error


def _tile(name: str, numbers: list[int]) -> Tile:
    kernel = name.partition(" ")[0]
    if kernel not in TUNABLE:
        raise ValueError(f"{name!r} names none of the kernels {', '.join(TUNABLE)}")
    counts = isinstance(numbers, list) and all(type(x) is int and x > 0 for x in numbers)
    powers = [*numbers[:2], *numbers[3:4]] if counts else []
    if not 2 <= len(powers) <= 3 or len(numbers) > 6 or any(x & (x - 1) for x in powers):
        raise ValueError(
            f"{name!r} has {numbers}, which is no tile: tokens and channels, then splits, warps,"
            " stages and registers; tokens, channels and warps are powers of two"
        )
    return Tile(*numbers)


def tunable(
    default: Callable[[int, int, torch.dtype], Tile],
) -> Callable[[int, int, torch.dtype], Tile]:
    """The tile of a kernel: the file's where it has this case, else the one below."""

    @functools.cache
    @functools.wraps(default)
    def tile(n: int, width: int, dtype: torch.dtype) -> Tile:
        return tuned().get(key(default.__name__, n, width, dtype)) or default(n, width, dtype)

    TUNABLE[default.__name__] = tile
    return tile


def padded(count: int) -> int:
    """The smallest power of two that holds `count` rows and that the matrix units accept."""
    size = 16
    while size < count:
        size *= 2
    return size


PHI_TERMS = 3
"""bf16 terms that phi is split into for bf16 streams: 8 bits of its mantissa each, all of it."""


def terms(dtype: torch.dtype) -> int:
    """Terms that an fp32 factor of a product with these streams is split into.

    bf16 streams are exact in bf16, so a sum of bf16 terms gives a nearly exact product at the bf16
    rate. Other streams meet it in fp32 (three TF32 products).
    """
    return PHI_TERMS if dtype == torch.bfloat16 else 1


def cdiv(count: int, size: int) -> int:
    """Pieces of this size that `count` fills. (Triton's own takes the host 2 us.)"""
    return -(-count // size)


def shares(blocks: int, resident: int) -> int:
    """Shares of the tokens with which `blocks` of channels fill whole waves best: 4 to 26, or as
    many as narrow streams want for one wave.

    A wave is what runs at once: `resident` programs. The last wave costs as much when half empty.
    """

    def filled(count: int) -> float:
        waves = -(-blocks * count // resident)
        return blocks * count / (waves * resident)

    return max(range(4, max(26, resident // blocks) + 1), key=filled)


@tunable
def combine_and_project(n: int, width: int, dtype: torch.dtype) -> Tile:
    """`projection.combine_and_project_kernel`: a block of channels and every P-th tile of tokens,
    P = programs a block.

    With bf16 and n = 4 a program takes most of a multiprocessor's shared memory. Every program
    loads phi first, so all of them run at once where that fills 0.8 of the multiprocessors.
    128 channels, as wide pieces of a token are read faster (docs/measured-facts.md).
    """
    return _projecting(n, width, dtype, 128)


@tunable
def project_delayed(n: int, width: int, dtype: torch.dtype) -> Tile:
    """The same kernel for delayed sites, whose u it mostly makes too: with bf16 and n = 4 half as
    many channels, and two programs a multiprocessor, as u takes registers (docs/measured-facts.md).
    """
    return _projecting(n, width, dtype, 64)


def _projecting(n: int, width: int, dtype: torch.dtype, most: int) -> Tile:
    """With at most so many channels."""
    roomy = shared_memory() >= 200_000
    stages = 1 if n == 8 and not roomy else 3
    if n == 8:
        channels = 32 if dtype == torch.bfloat16 and roomy else 16
    elif dtype == torch.bfloat16:
        channels = most if roomy else 64
    else:
        channels = 32
    resident = multiprocessors() * (2 if roomy and channels == 64 else 1)
    blocks = -(-width // channels)
    splits = resident // blocks
    if splits * blocks < 0.8 * resident:  # more waves, better filled
        splits = shares(blocks, resident)
    return Tile(32, channels, splits, warps=4, stages=stages)


@tunable
def coefficients(n: int, width: int, dtype: torch.dtype) -> Tile:
    """`coefficients_kernel`: a few tokens a program, at most `combine_and_project`'s; it reads no
    channels."""
    return Tile(tokens=8, channels=1, warps=1)


COEFFICIENTS_LOADS = 256
"""Partial sums that a warp of `coefficients_kernel` loads at once, twice as many at n = 8. More are
slower: the code is longer, and each launch fetches it anew (docs/measured-facts.md)."""


@tunable
def coefficient_gradients(n: int, width: int, dtype: torch.dtype) -> Tile:
    """`coefficient_gradients_kernel`: as `coefficients`, with n sums over channels."""
    return Tile(tokens=16, channels=128 if n <= 4 else 64, warps=4, stages=2)


@tunable
def stream_gradients(n: int, width: int, dtype: torch.dtype) -> Tile:
    """`stream_gradients_kernel`: as `combine_and_project`, four programs a multiprocessor."""
    if n == 8 and dtype == torch.bfloat16:
        return Tile(tokens=16, channels=16, splits=8, warps=4, stages=1)
    if n == 8:
        return Tile(tokens=16, channels=16, splits=8, warps=8, stages=3)
    if dtype != torch.bfloat16:
        return Tile(tokens=16, channels=32, splits=8, warps=4, stages=3)
    return Tile(8, 64, shares(-(-width // 64), 4 * multiprocessors()), warps=2, stages=1)


@tunable
def read_gradients(n: int, width: int, dtype: torch.dtype) -> Tile:
    """`stream_gradients_kernel` where `combine_read` asks. As `stream_gradients`, a file's too,
    unless a file names its own."""
    return TUNABLE["stream_gradients"].__wrapped__(n, width, dtype)  # type: ignore[attr-defined]


def rows_at_a_time(rows: int) -> int:
    """Rows of phi that a product of `stream_gradients_kernel` takes.

    All at once, padded to a power of two; but not the 80 of n = 8, of which 48 would be padding.
    """
    return padded(rows) if rows <= 64 else 16


@tunable
def phi_gradient(n: int, width: int, dtype: torch.dtype) -> Tile:
    """`phi_gradient.phi_gradient_kernel`: a block of the n*C columns and every P-th tile of tokens,
    P = programs a block."""
    if n == 8 and dtype == torch.bfloat16:
        return Tile(tokens=32, channels=128, splits=8, warps=8, stages=2)
    if dtype == torch.float32 or n == 8:
        return Tile(tokens=32, channels=32, splits=8, warps=4, stages=1)
    blocks = -(-n * width // 128)
    if blocks > 160:  # above C 5120 at n = 4; measured at C 7168 (docs/measured-facts.md)
        return Tile(32, 128, splits=4, warps=4, stages=2)
    # the third stage: up to C 512 at n = 4, which was measured (docs/measured-facts.md)
    stages = 3 if blocks <= 16 else 2
    return Tile(64, 128, splits=min(max(512 // blocks, 4), 16), warps=4, stages=stages)


@tunable
def aggregate(n: int, width: int, dtype: torch.dtype) -> Tile:
    """The two kernels of `aggregate` alone."""
    return Tile(tokens=4, channels=512 if n <= 4 else 256, warps=8, stages=2)


@tunable
def combine(n: int, width: int, dtype: torch.dtype) -> Tile:
    """`combine_and_project_kernel` where it only combines. There is no phi to keep on chip, so a
    program has one tile of wide pieces of few tokens, as in `rebuild` (docs/measured-facts.md)."""
    return Tile(tokens=4, channels=256 if n <= 4 else 128, warps=4, stages=1)


@tunable
def combine_gradients(n: int, width: int, dtype: torch.dtype) -> Tile:
    """`combine_gradients_kernel`: n + n*n sums a channel of a tile are in registers."""
    if n > 4:
        return Tile(tokens=1, channels=256, warps=4, stages=1)
    return Tile(tokens=2, channels=256, warps=4, stages=1)


@tunable
def rebuild(n: int, width: int, dtype: torch.dtype) -> Tile:
    """`rebuild_kernel`: so many boundaries a launch, each compiled out in full, the streams in
    registers; with more than one stage a boundary's loads are issued before the stores of the one
    before, which takes 40 registers more and is slower (docs/measured-facts.md: bf16, n 4, C 4096
    alone was timed). Sixteen boundaries compile for 55 seconds, eight for ten."""
    if n > 4:
        return Tile(tokens=4, channels=128, splits=4, warps=4, stages=1)
    return Tile(tokens=2, channels=256, splits=8, warps=4, stages=1)


SINKHORN_TOKENS = 8
"""Matrices a program of `sinkhorn` alone; one value a thread at n = 4 and four warps."""
