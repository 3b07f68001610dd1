"""The kernels of a site both ways, and those that run elsewhere; the tiles that may run them."""

import argparse
import itertools
from collections.abc import Callable

import torch

from megatron_mhc.kernels.arguments import DEFAULT, Mixing, Sizes
from megatron_mhc.kernels.triton import launch, tiles
from megatron_mhc.kernels.triton.passes.aggregate import make_u
from megatron_mhc.kernels.triton.passes.coefficient_gradients import coefficient_gradients
from megatron_mhc.kernels.triton.passes.coefficients import coefficients_and_u
from megatron_mhc.kernels.triton.passes.combine_gradients import combine_gradients
from megatron_mhc.kernels.triton.passes.phi_gradient import phi_gradient
from megatron_mhc.kernels.triton.passes.projection import (
    combine_and_project,
    combine_project_and_read,
)
from megatron_mhc.kernels.triton.passes.stream_gradients import stream_gradients
from megatron_mhc.kernels.triton.rebuild import rebuild

BOUNDARIES = 8
"""That `rebuild` goes through here: a block of four layers."""


def kernel_floors(n: int) -> dict[str, int]:
    """Passes that each kernel must move with n streams, partial sums left out; `rebuild`'s are
    those of one launch."""
    return {
        "combine_and_project": 2 * n + 1,
        "project_delayed": 2 * n + 2,
        "coefficients": 0,
        "aggregate": n + 1,
        "coefficient_gradients": n + 1,
        "stream_gradients": 3 * n + 3,
        "read_gradients": 3 * n + 3,
        "phi_gradient": n,
        "combine": 2 * n + 1,
        "combine_gradients": 3 * n + 2,
        "rebuild": n + 1 + BOUNDARIES * (n + 2),
    }


NOT_IN_SINGLE_PASS = ("combine_and_project", "aggregate", "stream_gradients")
NOT_IN_TWO = ("project_delayed", "read_gradients")
"""Kernels that a site of delayed sites does not have, and that any other does not."""
ALONE = ("combine", "combine_gradients", "rebuild")
"""Kernels that no steady-state site has: they are timed by themselves."""
KERNELS = {
    "combine_and_project": "combine_and_project_kernel",
    "project_delayed": "combine_and_project_kernel",
    "coefficients": "coefficients_kernel",
    "aggregate": "aggregate_kernel",
    "coefficient_gradients": "coefficient_gradients_kernel",
    "stream_gradients": "stream_gradients_kernel",
    "read_gradients": "stream_gradients_kernel",
    "phi_gradient": "phi_gradient_kernel",
    "combine": "combine_and_project_kernel",
    "combine_gradients": "combine_gradients_kernel",
    "rebuild": "rebuild_kernel",
}
"""What the GPU calls each."""
GRIDS: dict[str, list[tuple[int, ...]]] = {
    "combine_and_project": [
        *itertools.product((32,), (128,), (2, 3, 4, 6, 13), (4,), (3,)),
        *itertools.product((32, 64), (64,), (2, 4, 8), (4,), (3,)),
        *itertools.product((32,), (64,), (4, 6), (4,), (2,)),
        *itertools.product((32, 64), (128,), (4,), (8,), (2,)),
        *itertools.product((64,), (64,), (2, 4), (8,), (2, 3)),
        *itertools.product((32,), (32,), (4,), (4,), (3,)),
    ],
    "project_delayed": [
        *itertools.product((16, 32, 64), (64,), (4,), (4, 8), (2, 3, 4)),
        *itertools.product((32,), (128,), (4,), (4, 8), (2, 3)),
        *itertools.product((32,), (32,), (4, 8), (2, 4), (3,)),
    ],
    "coefficients": [(tokens, 1, 1, warps, 2) for tokens in (4, 8, 16) for warps in (1, 2, 4)],
    "aggregate": [
        *itertools.product((1, 2, 4, 8), (512, 1024), (1,), (4,), (1,)),
        *itertools.product((4, 8), (256, 512), (1,), (8,), (1,)),
    ],
    "coefficient_gradients": [
        *itertools.product((8, 16, 32), (64, 128), (1,), (4,), (1, 2)),
        *itertools.product((4, 8), (64, 128), (1,), (1, 2), (1,)),
        *itertools.product((8, 16), (256, 512), (1,), (8,), (2,)),
        *itertools.product((8, 16), (128,), (1,), (2, 4), (1,), (80, 96)),
    ],
    "stream_gradients": [
        *itertools.product((8,), (64,), (4, 8, 16), (2,), (1, 3), (255,)),
        *itertools.product((16,), (32,), (4, 8), (2,), (3,), (255,)),
        *itertools.product((8,), (128,), (8,), (4,), (3,), (255,)),
        *itertools.product((8,), (64,), (8, 16), (4,), (1,), (128,)),
        *itertools.product((8,), (128,), (8, 16), (8,), (1,), (128,)),
        *itertools.product((8,), (32,), (8,), (1, 2), (1,), (168, 255)),
    ],
    "read_gradients": [
        *itertools.product((8,), (64,), (4, 8, 16), (2,), (1, 3), (255,)),
        *itertools.product((8,), (128,), (4, 8, 16), (4,), (1, 3), (255,)),
        *itertools.product((16,), (32, 64), (4, 8), (2, 4), (1, 3), (255,)),
    ],
    "phi_gradient": [
        *itertools.product((32, 64), (64, 128), (5, 8), (4,), (2, 3, 4)),
        *itertools.product((64,), (128,), (5, 8), (8,), (2, 3)),
    ],
    "combine": [
        *itertools.product((2, 4, 8), (256, 512), (1,), (4,), (1,)),
        *itertools.product((4, 8), (256, 512), (1,), (8,), (1,)),
        *itertools.product((32,), (128,), (1,), (4,), (3,)),
    ],
    "combine_gradients": [
        *itertools.product((1,), (256,), (1,), (2,), (1,), (160, 255)),
        *itertools.product((1,), (512,), (1,), (4,), (1,), (128, 160, 255)),
        *itertools.product((1,), (1024,), (1,), (8,), (1,), (160, 255)),
        *itertools.product((1,), (256,), (1,), (4,), (1,)),
        *itertools.product((2, 4), (256,), (1,), (4, 8), (1,)),
    ],
    "rebuild": [
        *itertools.product((2, 4), (256,), (4, 8), (4,), (1, 2)),
        *itertools.product((1, 2), (512,), (8,), (2, 4), (1, 2)),
        *itertools.product((1,), (1024,), (8,), (4,), (1, 2)),
    ],
}
"""Tiles to try with up to four streams."""
_WIDE_GRADIENTS: list[tuple[int, ...]] = [
    *itertools.product((16,), (16,), (8, 16), (2, 4), (1,)),
    *itertools.product((8, 16), (32,), (8, 16), (2, 4), (1, 3)),
    *itertools.product((8,), (64,), (2, 4, 8, 16), (4, 8), (1,)),
    *itertools.product((16,), (64,), (2, 4, 8, 16), (8,), (1,)),
]
WIDE_GRIDS: dict[str, list[tuple[int, ...]]] = {
    **GRIDS,
    "combine_and_project": list(itertools.product((32,), (16, 32), (1, 2, 4), (2, 4), (1, 2, 3))),
    "project_delayed": list(itertools.product((32,), (16, 32), (1, 2, 4), (2, 4), (1, 2, 3))),
    "coefficient_gradients": list(itertools.product((4, 8, 16), (32, 64, 128), (1,), (4,), (1, 2))),
    "stream_gradients": _WIDE_GRADIENTS,
    "read_gradients": _WIDE_GRADIENTS,
    "phi_gradient": list(itertools.product((32, 64), (64, 128), (4, 8), (4, 8), (1, 2, 3))),
    "combine": list(itertools.product((2, 4, 8), (128, 256), (1,), (4,), (1,))),
    "combine_gradients": [
        *itertools.product((1,), (128, 256), (1,), (4,), (1,)),
        *itertools.product((1,), (256, 512), (1,), (8,), (1,)),
    ],
    "rebuild": list(itertools.product((2, 4), (128, 256), (4, 8), (4,), (1, 2))),
}
"""Those with more: four times the coefficients leave no room for as many channels."""


def grid(kernel: str, n: int) -> list[tuple[int, ...]]:
    """The tiles to try for a kernel with n streams."""
    return (GRIDS if n <= 4 else WIDE_GRIDS)[kernel]


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


def running(kernel: str, n: int, width: int) -> tuple[int, ...]:
    """The tile of `kernels.triton.tiles` for bf16, as `--tiles` takes it."""
    tile = tuple(getattr(tiles, kernel)(n, width, torch.bfloat16))
    return tile[:-1] if tile[-1] is None else tile


def use_tile(kernel: str, numbers: tuple[int, ...]) -> None:
    """Have every later launch of a kernel in this process run with this tile."""
    tile = tiles.Tile(*numbers)
    setattr(tiles, kernel, lambda *_: tile)
    launch.forget()


def subjects(
    tokens: int, width: int, n: int = 4, device: str = "cuda"
) -> dict[str, Callable[[], object]]:
    """The kernels with their small companions, as closures over one site's tensors."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    rows = n * n + 2 * n
    x, dy = normal(tokens, n, width).bfloat16(), normal(tokens, n, width).bfloat16()
    f, du = normal(tokens, width).bfloat16(), normal(tokens, width).bfloat16()
    h_post = 2 * torch.sigmoid(normal(tokens, n))
    h_res = torch.softmax(normal(tokens, n, n), -1)
    phi, bias = normal(rows, n * width) * 0.02, normal(rows)
    alpha = torch.full((3,), 0.5, device=device)
    mixing = Mixing(f, h_post, h_res)
    # an f of its own each: a program would find one and the same in its cache
    ended = [Mixing(normal(tokens, width).bfloat16(), h_post, h_res) for _ in range(BOUNDARIES)]
    sizes = Sizes.of(x)
    y, partial = combine_and_project(sizes, x, phi, mixing)
    coefficients_args = (sizes, (tokens,), y, partial, alpha, bias, DEFAULT)
    done = coefficients_and_u(*coefficients_args, aggregate=True)
    small = {"d_post": normal(tokens, n), "d_res": normal(tokens, n, n)}
    token_args = (sizes, y, done.normed, alpha, bias, DEFAULT)
    token = coefficient_gradients(*token_args, du=du, **small)

    return {
        "combine_and_project": lambda: combine_and_project(sizes, x, phi, mixing),
        "project_delayed": lambda: combine_project_and_read(sizes, x, phi, mixing, done.h_pre),
        "coefficients": lambda: coefficients_and_u(*coefficients_args, aggregate=False),
        "aggregate": lambda: make_u(sizes, y, done.h_pre),
        "coefficient_gradients": lambda: coefficient_gradients(*token_args, du=du, **small),
        "stream_gradients": lambda: stream_gradients(
            sizes, y, dy=dy, du=du, phi=phi, token=token, x=x, mixing=mixing
        ),
        "read_gradients": lambda: stream_gradients(
            sizes,
            y,
            dy=dy,
            du=du,
            phi=phi,
            token=token,
            x=x,
            mixing=mixing,
            h_pre=done.h_pre,
        ),
        "phi_gradient": lambda: phi_gradient(sizes, y, token.d_z_k_h_pre, rows),
        "combine": lambda: combine_and_project(sizes, x, None, mixing),
        "combine_gradients": lambda: combine_gradients(sizes, x, dy, mixing),
        "rebuild": lambda: rebuild(x, [done.h_pre] * (BOUNDARIES + 1), ended),
    }
