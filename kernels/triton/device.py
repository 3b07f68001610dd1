"""Device functions that several kernels share, so that they round alike.

Tiles of one stream are [BT, BC]; a tuple holds one tile a stream. Triton indexes a tuple at compile
time, so every stream stays in registers.
"""

# ruff: noqa: RUF005 (Triton's language has no starred tuples)

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def product(a, b, accumulator):
    """accumulator + a b for bf16 a and b (the interpreter multiplies bf16 only after a cast)."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    else:
        return tl.dot(a, b, accumulator)


@triton.jit
def rounded(tile, dtype: tl.constexpr):
    """fp32 -> dtype, to the nearest; two elements an instruction for bf16.

    In assembly, as Triton converts elements one by one where it likes, and converts a tile twice
    that is stored and multiplied.
    """
    if not INTERPRETED and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;",
            "=r,r,r",
            [tile],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return tile.to(dtype)


@triton.jit
def to_fp32(tile):
    """A tile in fp32: for bf16 one instruction an element, where the compiler takes two."""
    if INTERPRETED or tile.dtype != tl.bfloat16:
        return tile.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [tile],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )


@triton.jit
def load_streams(ptr, offsets, mask, C: tl.constexpr, N: tl.constexpr):
    """The N tiles [BT, BC] of the streams at `offsets` (of stream 0), in their own dtype."""
    tiles = ()
    for j in tl.static_range(N):
        tiles = tiles + (tl.load(ptr + offsets + j * C, mask, 0.0),)
    return tiles


@triton.jit
def load_columns(ptr, t64, mask, COUNT: tl.constexpr):
    """The COUNT columns of a [T, COUNT] fp32 matrix at tokens t64, each [BT]; mask None: all."""
    columns = ()
    for j in tl.static_range(COUNT):
        if mask is None:
            columns = columns + (tl.load(ptr + t64 * COUNT + j),)
        else:
            columns = columns + (tl.load(ptr + t64 * COUNT + j, mask, 0.0),)
    return columns


@triton.jit
def after_rows(ptr, T, COUNT: tl.constexpr):
    """What lies behind [T, COUNT]: several small tensors share an allocation, one each costs the
    host more than the kernel."""
    return ptr + T.to(tl.int64) * COUNT


@triton.jit
def sum_blocks(
    ptr,
    row: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    LOADS: tl.constexpr,
    BT: tl.constexpr,
):
    """[BT, WIDTH]: WIDTH rows from `row` on of partial sums [BLOCKS, ROWS, TILE], BT tokens of them
    from ptr on, added up over BLOCKS in a fixed order, LOADS elements at a time."""
    BS: tl.constexpr = LOADS // (BT * WIDTH)
    offsets = (row + tl.arange(0, WIDTH))[None, :] * TILE + tl.arange(0, BT)[:, None]
    total = tl.zeros((BS, BT, WIDTH), tl.float32)
    for first in range(0, BLOCKS, BS):
        block = first + tl.arange(0, BS)[:, None, None]
        total += tl.load(ptr + block * (ROWS * TILE) + offsets[None, :, :], block < BLOCKS, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def mixed_stream(xs, f, h_res, h_post, i: tl.constexpr, N: tl.constexpr):
    """Stream i of y = H_res x + H_post^T f in fp32 [BT, BC]: one chain of fused multiply-adds."""
    y = h_post[i][:, None] * f
    for j in tl.static_range(N):
        y = tl.fma(h_res[i * N + j][:, None], xs[j].to(tl.float32), y)
    return y


@triton.jit
def _add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def row_sums(tiles, COUNT: tl.constexpr):
    """The sums over channels of COUNT tiles [BT, BC], four at a time where that many are left."""
    sums = ()
    if COUNT % 4 == 0 and not INTERPRETED:  # one exchange between threads serves four tiles
        for k in tl.static_range(COUNT // 4):
            four = (tiles[4 * k], tiles[4 * k + 1], tiles[4 * k + 2], tiles[4 * k + 3])
            sums = sums + tl.reduce(four, 1, _add_four)
    else:
        for k in tl.static_range(COUNT):
            sums = sums + (tl.sum(tiles[k], axis=1),)
    return sums


@triton.jit
def sinkhorn_first(logits, EPS: tl.constexpr):
    """The first Sinkhorn iteration: logits [BT, N, N] (dst, src) -> P, M, both [BT, N, N].

    P is the softmax over dst, M the matrix after the division by row sums. At EPS 0 the rows are
    normalised in the log domain too, where no sum can underflow.
    """
    shifted = logits - tl.max(logits, axis=1, keep_dims=True)
    exponentials = tl.exp(shifted)
    sums = tl.sum(exponentials, axis=1, keep_dims=True)
    softmax = exponentials / sums
    if EPS == 0.0:
        shifted = shifted - tl.log(sums)
        shifted = shifted - tl.max(shifted, axis=2, keep_dims=True)
        exponentials = tl.exp(shifted)
        matrix = exponentials / tl.sum(exponentials, axis=2, keep_dims=True)
    else:
        matrix = softmax + EPS
        matrix = matrix / (tl.sum(matrix, axis=2, keep_dims=True) + EPS)
    return softmax, matrix


@triton.jit
def divide_columns(matrix, EPS: tl.constexpr):
    """[BT, N, N] (dst, src) over its sums over dst."""
    return matrix / (tl.sum(matrix, axis=1, keep_dims=True) + EPS)


@triton.jit
def divide_rows(matrix, EPS: tl.constexpr):
    """[BT, N, N] (dst, src) over its sums over src."""
    return matrix / (tl.sum(matrix, axis=2, keep_dims=True) + EPS)


@triton.jit
def sinkhorn_forward(logits, ITERATIONS: tl.constexpr, EPS: tl.constexpr):
    """`reference.sinkhorn` of logits [BT, N, N]: one matrix over N*N lanes of a warp."""
    _, matrix = sinkhorn_first(logits, EPS)
    for _ in range(ITERATIONS - 1):
        matrix = divide_rows(divide_columns(matrix, EPS), EPS)
    return matrix


@triton.jit
def sinkhorn_backward(logits, gradient, ITERATIONS: tl.constexpr, EPS: tl.constexpr):
    """Gradient of the logits [BT, N, N] from the gradient of `sinkhorn_forward`'s result.

    In log space a division M = A / (sum(A) + EPS) has the backward G_A = G_M - M sum(G_M), with
    G = dL/dlog: no division, nothing of A. Each iteration's matrix stays in registers.
    """
    softmax, matrix = sinkhorn_first(logits, EPS)
    matrices = (matrix,)
    for _ in tl.static_range(ITERATIONS - 1):
        matrix = divide_rows(divide_columns(matrix, EPS), EPS)
        matrices = matrices + (matrix,)
    log_gradient = gradient * matrix
    for step in tl.static_range(ITERATIONS - 1):
        rows = matrices[ITERATIONS - 1 - step]
        log_gradient -= rows * tl.sum(log_gradient, axis=2, keep_dims=True)
        columns = divide_columns(matrices[ITERATIONS - 2 - step], EPS)
        log_gradient -= columns * tl.sum(log_gradient, axis=1, keep_dims=True)
    log_gradient -= matrices[0] * tl.sum(log_gradient, axis=2, keep_dims=True)
    if EPS != 0.0:  # the first matrix was softmax + EPS
        log_gradient *= softmax / (softmax + EPS)
    return log_gradient - softmax * tl.sum(log_gradient, axis=1, keep_dims=True)
