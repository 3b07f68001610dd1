"""z = vec(y) phi^T on chip: what `combine_and_project_kernel` makes of a tile of streams.

`through_phi` is the way back.
"""

# ruff: noqa: RUF005, SIM108 (Triton's language has no starred tuples)

import triton
import triton.language as tl

from ..device import product


@triton.jit
def as_operand(tile):
    """[rows, BC] -> the same, its channels in the order of `as_transposed_operand`."""
    ROWS: tl.constexpr = tile.shape[0]
    BC: tl.constexpr = tile.shape[1]
    tile = tl.permute(tl.reshape(tile, (ROWS, BC // 8, 4, 2)), (0, 2, 1, 3))
    return tl.reshape(tile, (ROWS, BC))


@triton.jit
def as_transposed_operand(tile):
    """[BT, BC] -> [BC, BT], its channels in an order in which nothing has to move.

    A thread loads 8 channels in a row (16 bits each). A product of matrices wants 2 of each 8 from
    it. A product does not depend on the order of the channels, if both factors have the same one.
    So both name the channels such that every thread has already loaded its part of the product.
    (fp32 factors move anyway.)
    """
    BT: tl.constexpr = tile.shape[0]
    BC: tl.constexpr = tile.shape[1]
    tile = tl.permute(tl.reshape(tile, (BT, BC // 8, 4, 2)), (2, 1, 3, 0))
    return tl.reshape(tile, (BC, BT))


@triton.jit
def load_phi(
    phi_ptr,
    i: tl.constexpr,
    c,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """The tiles [16, BC] of phi for stream i that `add_products` multiplies with.

    16 rows at a time, a tile for each bf16 term of them (one in fp32 where TERMS is 1). The rest is
    8 rows at most. Its three terms fill two tiles: the first term over the second, and zeros over
    the third.
    """
    FULL: tl.constexpr = ROWS // 16
    row = tl.arange(0, 16)[:, None]
    columns = phi_ptr + (i * C + c)[None, :]
    mask = (c < C)[None, :]
    tiles = ()
    for j in tl.static_range(FULL):
        phi = tl.load(columns + (16 * j + row) * (N * C), mask, 0.0)
        if TERMS == 1:
            tiles = tiles + (as_operand(phi),)
        else:
            for _ in tl.static_range(TERMS):
                term = phi.to(tl.bfloat16)
                tiles = tiles + (as_operand(term),)
                phi -= term.to(tl.float32)
    if ROWS % 16 > 0 and TERMS == 1:
        rest = 16 * FULL + row
        tiles = tiles + (as_operand(tl.load(columns + rest * (N * C), mask & (rest < ROWS), 0.0)),)
    elif ROWS % 16 > 0:
        rest = 16 * FULL + row % 8
        phi = tl.load(columns + rest * (N * C), mask & (rest < ROWS), 0.0)
        first = phi.to(tl.bfloat16)
        phi -= first.to(tl.float32)
        second = phi.to(tl.bfloat16)
        phi -= second.to(tl.float32)
        third = phi.to(tl.bfloat16)
        tiles = tiles + (as_operand(tl.where(row < 8, first, second)),)
        tiles = tiles + (as_operand(tl.where(row < 8, 0.0, third).to(tl.bfloat16)),)
    return tiles


@triton.jit
def add_products(phi, y, sums, ROWS: tl.constexpr, TERMS: tl.constexpr):
    """The sums [16, BT] with phi y [BC, BT] of one stream added.

    With three terms, 16 rows have two sums: one of the first term, one of the two others. The rest
    has one: the first term in its upper half, the others in its lower half.
    """
    FULL: tl.constexpr = ROWS // 16
    longer = ()
    if TERMS == 1:
        for j in tl.static_range(len(sums)):
            longer = longer + (tl.dot(phi[j], y, sums[j], input_precision="tf32x3"),)
    else:
        for j in tl.static_range(FULL):
            low = product(phi[3 * j + 1], y, sums[2 * j + 1])
            low = product(phi[3 * j + 2], y, low)
            longer = longer + (product(phi[3 * j], y, sums[2 * j]), low)
        if ROWS % 16 > 0:
            z = product(phi[3 * FULL], y, sums[2 * FULL])
            longer = longer + (product(phi[3 * FULL + 1], y, z),)
    return longer


@triton.jit
def store_sums(out_ptr, sums, ROWS: tl.constexpr, TERMS: tl.constexpr, BT: tl.constexpr):
    """z [ROWS, BT] of the sums of `add_products`."""
    FULL: tl.constexpr = ROWS // 16
    out = out_ptr + tl.arange(0, BT)[None, :]
    row = tl.arange(0, 16)[:, None]
    for j in tl.static_range(FULL):
        if TERMS == 1:
            z = sums[j]
        else:
            z = sums[2 * j] + sums[2 * j + 1]
        tl.store(out + (16 * j + row) * BT, z)
    if ROWS % 16 > 0 and TERMS == 1:
        tl.store(out + (16 * FULL + row) * BT, sums[FULL], 16 * FULL + row < ROWS)
    elif ROWS % 16 > 0:
        z = tl.sum(tl.reshape(sums[2 * FULL], (2, 8, BT)), axis=0)
        row = 16 * FULL + tl.arange(0, 8)[:, None]
        tl.store(out + row * BT, z, row < ROWS)


def count_sums(rows: int, terms: int) -> int:
    """The sums of 16 rows that `add_products` keeps for phi [rows, n*C] in so many terms."""
    full, rest = divmod(rows, 16)
    assert terms == 1 or rest <= 8, f"{rows} rows: {rest} behind the last 16, and 8 have room"
    return (1 if terms == 1 else 2) * full + (rest > 0)
