"""d_z phi: what comes of the streams' gradient through the projection.

`phi_products` is the way there.
"""

# ruff: noqa: RUF005 (Triton's language has no starred tuples)

import triton
import triton.language as tl

from ..device import product


@triton.jit
def load_weights(
    phi_ptr,
    c,
    c_mask,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    TERMS: tl.constexpr,
):
    """phi at channels c, transposed: a tile [BC, PART] for each stream, part of rows and term (two
    bf16 terms, or one in fp32 where TERMS is 1)."""
    row = tl.arange(0, PART)[:, None]
    weights = ()
    for i in tl.static_range(N):
        for p in tl.static_range((ROWS + PART - 1) // PART):
            w = phi_ptr + (p * PART + row) * (N * C) + (i * C + c)[None, :]
            phi = tl.load(w, c_mask[None, :] & (p * PART + row < ROWS), 0.0)
            if TERMS == 1:
                weights = weights + (tl.trans(phi),)
            else:
                high = phi.to(tl.bfloat16)
                low = (phi - high.to(tl.float32)).to(tl.bfloat16)
                weights = weights + (tl.trans(high), tl.trans(low))
    return weights


@triton.jit
def through_phi(
    weights,
    d_z_ptr,
    t64,
    t_mask,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    TERMS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """d_z phi of the N streams, each [BC, BT]: the channels are M, so dY keeps the layout of its
    load."""
    PARTS: tl.constexpr = (ROWS + PART - 1) // PART
    row = tl.arange(0, PART)
    d_zs = ()
    for p in tl.static_range(PARTS):
        z_row = (p * PART + row)[None, :]
        z_mask = t_mask[:, None] & (z_row < ROWS)
        d_z = tl.load(d_z_ptr + t64[:, None] * ROWS + z_row, z_mask, 0.0)  # [BT, PART]
        if TERMS == 1:
            d_zs = d_zs + (d_z,)
        else:
            high = d_z.to(tl.bfloat16)
            d_zs = d_zs + (high, (d_z - high.to(tl.float32)).to(tl.bfloat16))
    through = ()
    for i in tl.static_range(N):
        total = tl.zeros((BC, BT), tl.float32)
        for p in tl.static_range(PARTS):
            if TERMS == 1:
                w = weights[i * PARTS + p]
                total = tl.dot(w, tl.trans(d_zs[p]), total, input_precision="tf32x3")
            else:  # two bf16 terms a factor; low times low is below fp32's last bits
                high, low = weights[2 * (i * PARTS + p)], weights[2 * (i * PARTS + p) + 1]
                total = product(high, tl.trans(d_zs[2 * p]), total)
                total = product(high, tl.trans(d_zs[2 * p + 1]), total)
                total = product(low, tl.trans(d_zs[2 * p]), total)
        through = through + (total,)
    return through
