"""Tile sizes of the Triton kernels: fixed for (n, C, dtype), so a new token count changes nothing.

A kernel's configuration never depends on the token count: the same inputs give the same bits
whatever batch they are part of, and nothing is compiled or tuned again.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """What one program of a kernel works on.

    Attributes:
        tokens, channels: the tile that it holds in registers; powers of two.
        splits: programs that share the tokens of one block of channels.
        warps, stages, registers: Triton's num_warps, num_stages and maxnreg.
    """

    tokens: int
    channels: int
    splits: int = 1
    warps: int = 4
    stages: int = 2
    registers: int | None = None


def padded(count: int) -> int:
    """The smallest power of two that holds `count` rows and that the matrix units accept."""
    size = 16
    while size < count:
        size *= 2
    return size


RESIDENT = 4 * 132
"""Programs of two warps with 255 registers that an H100 holds: four a multiprocessor."""


def shares(blocks: int) -> int:
    """Shares of the tokens, 4 to 26, with which `blocks` of channels fill whole waves best.

    A wave is what runs at once, RESIDENT programs; the last one costs as much when half empty.
    """

    def filled(count: int) -> float:
        waves = -(-blocks * count // RESIDENT)
        return blocks * count / (waves * RESIDENT)

    return max(range(4, 27), key=filled)


def project(n: int, width: int, dtype: torch.dtype) -> Tile:
    """`triton_projection.project_kernel`: a block of channels, a share of tokens in turn."""
    if n == 8:
        return Tile(tokens=16, channels=16, splits=16, warps=4, stages=3)
    if dtype != torch.bfloat16:
        return Tile(tokens=16, channels=32, splits=16, warps=4, stages=3)
    return Tile(16, 64, shares(-(-width // 64)), warps=2, stages=3)


def finish(n: int, width: int, dtype: torch.dtype) -> Tile:
    """`triton_projection.finish_kernel`: a few tokens a program; it reads no channels."""
    return Tile(tokens=16, channels=1, warps=2)


def coefficients_backward(n: int, width: int, dtype: torch.dtype) -> Tile:
    """`triton_token_gradients.coefficients_kernel`: as `finish`, with n sums over channels."""
    return Tile(tokens=16, channels=128 if n <= 4 else 64, warps=4, stages=2)


def streams_backward(n: int, width: int, dtype: torch.dtype) -> Tile:
    """`triton_stream_gradients.streams_kernel`: a block of channels, a share of tokens in turn."""
    if n == 8:
        return Tile(tokens=16, channels=16, splits=8, warps=8, stages=3)
    if dtype != torch.bfloat16:
        return Tile(tokens=16, channels=32, splits=8, warps=4, stages=3)
    return Tile(8, 64, shares(-(-width // 64)), warps=2, stages=3)


def phi_gradient(n: int, width: int, dtype: torch.dtype) -> Tile:
    """`triton_phi_gradient.phi_kernel`: a block of the n*C columns, a share of tokens."""
    if dtype == torch.float32 or n == 8:
        return Tile(tokens=32, channels=32, splits=8, warps=4, stages=1)
    blocks = -(-n * width // 128)
    return Tile(32, 128, splits=min(max(640 // blocks, 4), 16), warps=4, stages=2)


def aggregate(n: int, width: int, dtype: torch.dtype) -> Tile:
    """The two kernels of `aggregate` alone."""
    return Tile(tokens=4, channels=512 if n <= 4 else 256, warps=8, stages=2)


SINKHORN_TOKENS = 8
"""Matrices a program of `sinkhorn` alone; one value a thread at n = 4 and four warps."""
