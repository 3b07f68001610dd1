"""The backward's first kernel over the streams: what the streams' gradient needs of a token.

From the gradients of u, h_post and h_res it goes through Sinkhorn, sigmoid and the norm to
d_z [rows], k and h_pre, with which dY = dy + h_pre^T du + d_z phi + k y.
"""

# ruff: noqa: RUF005, SIM108 (Triton's language has no starred tuples)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arguments import Options, Sizes
from .. import tiles
from ..device import after_rows, load_streams, sinkhorn_backward, to_fp32
from ..launch import Launch, prepared
from .sums import Rows


@triton.jit(do_not_specialize=["T"])
def coefficient_gradients_kernel(
    x_ptr,
    du_ptr,
    d_pre_ptr,
    d_post_ptr,
    d_res_ptr,
    normed_ptr,
    alpha_ptr,
    bias_ptr,
    out_ptr,
    d_parameters_ptr,
    T,
    norm_eps,
    pre_eps,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    AGGREGATE: tl.constexpr,
    HAS_MIXING: tl.constexpr,
    HAS_POST: tl.constexpr,
    HAS_RES: tl.constexpr,
    OUTSIDE_ROOT: tl.constexpr,
    ITERATIONS: tl.constexpr,
    SINKHORN_EPS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradients of u (AGGREGATE) or h_pre, of h_post and of h_res -> a token's d_z, k, h_pre.

    With l = alpha z / r + b and m = z / r: d_z = alpha d_l / r; k = -sum(alpha d_l m) / (r^2 N C),
    the factor of y in the gradient through r; with OUTSIDE_ROOT, r = rms + norm_eps, it is
    -sum(alpha d_l m) / (r rms N C). normed as `coefficients_kernel` wrote it; out: d_z
    [T, ROWS], k [T] and h_pre [T, N], one behind the other. d_parameters [programs, ROWS + 3 (or
    1)]: sums over this program's tokens of d_l (for bias) and of d_l m (for alpha).
    """
    ALPHAS: tl.constexpr = 3 if HAS_MIXING else 1
    z_over_r_ptr, d_z_ptr = normed_ptr, out_ptr
    inverse_r_ptr = after_rows(normed_ptr, T, ROWS)
    k_ptr = after_rows(out_ptr, T, ROWS)
    h_pre_ptr = after_rows(out_ptr, T, ROWS + 1)
    program = tl.program_id(0)
    d_bias_ptr = d_parameters_ptr + program * (ROWS + ALPHAS)
    d_alpha_ptr = d_bias_ptr + ROWS
    t = (tl.num_programs(0) - 1 - program) * BT + tl.arange(0, BT)
    t64 = t.to(tl.int64)
    t_mask = t < T
    inverse_r = tl.load(inverse_r_ptr + t64, t_mask, 0.0)

    if AGGREGATE:
        products = ()
        for _ in tl.static_range(N):
            products = products + (tl.zeros((BT, BC), tl.float32),)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            mask = t_mask[:, None] & (c < C)[None, :]
            streams = load_streams(x_ptr, t64[:, None] * (N * C) + c[None, :], mask, C, N)
            du = to_fp32(tl.load(du_ptr + t64[:, None] * C + c[None, :], mask, 0.0))
            longer = ()
            for j in tl.static_range(N):
                longer = longer + (tl.fma(to_fp32(streams[j]), du, products[j]),)
            products = longer

    through_norm = tl.zeros((BT,), tl.float32)  # sum of alpha d_l m
    alpha = tl.load(alpha_ptr)
    d_alpha = tl.zeros((BT,), tl.float32)
    for j in tl.static_range(N):
        if AGGREGATE:
            d_weight = tl.sum(products[j], axis=1)
        else:
            d_weight = tl.load(d_pre_ptr + t64 * N + j, t_mask, 0.0)
        z_over_r = tl.load(z_over_r_ptr + t64 * ROWS + j, t_mask, 0.0)
        weight = tl.sigmoid(tl.fma(z_over_r, alpha, tl.load(bias_ptr + j)))
        tl.store(h_pre_ptr + t64 * N + j, weight + pre_eps, t_mask)
        d_logit = tl.where(t_mask, d_weight * weight * (1.0 - weight), 0.0)
        tl.store(d_z_ptr + t64 * ROWS + j, alpha * d_logit * inverse_r, t_mask)
        tl.store(d_bias_ptr + j, tl.sum(d_logit, axis=0))
        d_alpha = tl.fma(d_logit, z_over_r, d_alpha)
    through_norm = tl.fma(d_alpha, alpha, through_norm)
    tl.store(d_alpha_ptr, tl.sum(d_alpha, axis=0))

    if HAS_MIXING:
        j = tl.arange(0, N)
        offsets = t64[:, None] * ROWS + N + j[None, :]  # [BT, N]
        mask = t_mask[:, None] & (j >= 0)[None, :]
        alpha = tl.load(alpha_ptr + 1)
        z_over_r = tl.load(z_over_r_ptr + offsets, mask, 0.0)
        weight = tl.sigmoid(tl.fma(z_over_r, alpha, tl.load(bias_ptr + N + j)[None, :]))
        d_logits = tl.zeros((BT, N), tl.float32)
        if HAS_POST:
            d_weight = tl.load(d_post_ptr + t64[:, None] * N + j[None, :], mask, 0.0)
            d_logits = 2.0 * d_weight * weight * (1.0 - weight)
        d_logits = tl.where(mask, d_logits, 0.0)
        tl.store(d_z_ptr + offsets, alpha * d_logits * inverse_r[:, None], mask)
        tl.store(d_bias_ptr + N + j, tl.sum(d_logits, axis=0))
        d_alpha = tl.sum(d_logits * z_over_r, axis=1)
        through_norm = tl.fma(d_alpha, alpha, through_norm)
        tl.store(d_alpha_ptr + 1, tl.sum(d_alpha, axis=0))

        if ROWS_FIRST:
            entry = j[None, :] * N + j[:, None]  # [N, N] (src, dst)
        else:
            entry = j[:, None] * N + j[None, :]  # [N, N] (dst, src)
        offsets = t64[:, None, None] * ROWS + 2 * N + entry[None, :, :]
        mask = t_mask[:, None, None] & (entry >= 0)[None, :, :]
        alpha = tl.load(alpha_ptr + 2)
        z_over_r = tl.load(z_over_r_ptr + offsets, mask, 0.0)
        d_logits = tl.zeros((BT, N, N), tl.float32)
        if HAS_RES:
            logits = tl.fma(z_over_r, alpha, tl.load(bias_ptr + 2 * N + entry)[None, :, :])
            d_matrix_offsets = t64[:, None, None] * (N * N) + entry[None, :, :]
            d_matrix = tl.load(d_res_ptr + d_matrix_offsets, mask, 0.0)
            d_logits = sinkhorn_backward(logits, d_matrix, ITERATIONS, SINKHORN_EPS)
        d_logits = tl.where(mask, d_logits, 0.0)
        tl.store(d_z_ptr + offsets, alpha * d_logits * inverse_r[:, None, None], mask)
        tl.store(d_bias_ptr + 2 * N + entry, tl.sum(d_logits, axis=0))
        d_alpha = tl.sum(tl.sum(d_logits * z_over_r, axis=2), axis=1)
        through_norm = tl.fma(d_alpha, alpha, through_norm)
        tl.store(d_alpha_ptr + 2, tl.sum(d_alpha, axis=0))

    if OUTSIDE_ROOT:  # zero for streams that are: so is the norm's own gradient there
        rms = 1.0 / inverse_r - norm_eps
        inverse_rms = tl.where(rms > 0.0, 1.0 / rms, 0.0)
        tl.store(k_ptr + t64, -through_norm * inverse_r * inverse_rms / (N * C), t_mask)
    else:
        tl.store(k_ptr + t64, -through_norm * inverse_r * inverse_r / (N * C), t_mask)


class CoefficientGradients(NamedTuple):
    """What `coefficient_gradients` returns: d_z [T, rows], k [T] and h_pre [T, n] one behind the
    other in memory, and gradients of parameters: empty until `stream_gradients` has added up what
    is `left` of them."""

    d_z_k_h_pre: Tensor
    d_alpha: Tensor | None = None
    d_bias: Tensor | None = None
    left: Rows | None = None


@prepared
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    width: int,
    rows: int,
    has: tuple[bool, bool, bool],
    options: Options,
) -> tuple[Launch, tiles.Tile]:
    """The kernel for streams of this dtype; `has`: whether there are du, d_post and d_res."""
    tile = tiles.coefficient_gradients(n, width, dtype)
    launch = Launch(
        coefficient_gradients_kernel,
        device,
        N=n,
        C=width,
        ROWS=rows,
        AGGREGATE=has[0],
        HAS_MIXING=rows > n,
        HAS_POST=has[1],
        HAS_RES=has[2],
        OUTSIDE_ROOT=options.outside_root,
        ITERATIONS=options.iterations,
        SINKHORN_EPS=options.sinkhorn_eps,
        ROWS_FIRST=options.rows_first,
        BT=tile.tokens,
        BC=tile.channels,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return launch, tile


def coefficient_gradients(
    sizes: Sizes,
    y: Tensor,
    normed: Tensor,
    alpha: Tensor,
    bias: Tensor,
    options: Options,
    *,
    du: Tensor | None = None,
    d_pre: Tensor | None = None,
    d_post: Tensor | None = None,
    d_res: Tensor | None = None,
) -> CoefficientGradients:
    """Launch `coefficient_gradients_kernel` for the streams y that were projected.

    du or d_pre is the gradient of what H_pre became; an absent one is zero.
    """
    tokens, n, width = sizes
    rows, new = bias.shape[0], normed.new_empty
    out = new(tokens, rows + 1 + n)
    if tokens == 0:
        return CoefficientGradients(out, torch.zeros_like(alpha), torch.zeros_like(bias))
    if du is None and d_pre is None:
        d_pre = normed.new_zeros(tokens, n)
    has = (du is not None, d_post is not None, d_res is not None)
    launch, tile = _launch(y.device, y.dtype, n, width, rows, has, options)
    programs = tiles.cdiv(tokens, tile.tokens)
    d_parameters = new(programs, rows + alpha.shape[0])
    tensors = (y, du, d_pre, d_post, d_res, normed, alpha, bias, out, d_parameters)
    launch((programs, 1), tensors, tokens, options.norm_eps, options.pre_eps)
    d_bias, d_alpha = torch.empty_like(bias), torch.empty_like(alpha)
    return CoefficientGradients(out, d_alpha, d_bias, Rows(d_parameters, d_bias, d_alpha))
