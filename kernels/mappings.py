"""The definition of H_pre, H_post and H_res in plain PyTorch, of mHC and of HC.

`reference` says what the shapes and the sources are, and what is done with the three.
"""

import math

import torch
from torch import Tensor

HC_NORM_EPS = 1e-6
"""eps of the RMS norm that HC applies to each stream (`hc_coefficients`)."""


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of coefficients and sums for streams x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sinkhorn(logits: Tensor, iterations: int = 20, eps: float = 0.0) -> Tensor:
    """Project exp(logits) onto the doubly stochastic matrices (paper eq. 9, Sinkhorn-Knopp).

    An iteration divides the columns (sums over dst) and then the rows (sums over src). With eps = 0
    the first one runs in the log domain, so that no logit is too large. With eps > 0, the
    convention `deepseek_v4`, it is a softmax over dst, plus eps, then a division by
    (row sum + eps); every later division adds eps to the sum too.

    Args:
        logits: [..., n, n], indexed [dst, src].
        iterations: number of (columns, rows) divisions, at least 1.
        eps: 0 for the paper's convention, 1e-6 for `deepseek_v4`.

    Returns:
        [..., n, n] in fp32 (float64 for float64 logits): rows sum to 1, columns nearly.
    """
    logits = logits.to(accumulation_dtype(logits))
    if eps == 0.0:
        logits = logits - logits.logsumexp(-2, keepdim=True)
        matrix = (logits - logits.logsumexp(-1, keepdim=True)).exp()
    else:
        matrix = logits.softmax(-2) + eps
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
    return matrix


def coefficients(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    iterations: int = 20,
    norm_eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 0.0,
    norm_form: str = "inside_root",
    sinkhorn_order: str = "columns_first",
) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre, H_post and H_res of every token (paper eq. 7, 8 and 14 to 19).

    Args:
        x: [..., n, C].
        phi: [n*n + 2n, n*C]; rows: n for H_pre, n for H_post, n*n for H_res (row dst*n + src).
        alpha: [3], the scales of the three groups of rows.
        bias: [n*n + 2n].
        iterations, sinkhorn_eps: see `sinkhorn`.
        norm_eps: added to the mean square of the n*C values before the root; with norm_form
            "outside_root", as Megatron's own mHC has it, to their root mean square.
        pre_eps: added to H_pre after the sigmoid.
        sinkhorn_order: "rows_first", as Megatron's main had it in August 2026, for an iteration
            that divides the rows (sums over src) and then the columns (sums over dst).

    Returns:
        h_pre [..., n], h_post [..., n], h_res [..., n, n] (dst, src), fp32 (or float64).
    """
    n = x.shape[-2]
    v = x.to(accumulation_dtype(x)).flatten(-2)
    # dividing by the norm after the projection lets one pass over x give both (eq. 14-16)
    inverse_r = _inverse_norm(v, norm_eps, norm_form)
    z_over_r = v @ phi.t() * inverse_r
    logits_pre, logits_post, logits_res = z_over_r.split([n, n, n * n], dim=-1)
    bias_pre, bias_post, bias_res = bias.split([n, n, n * n])
    h_pre = torch.sigmoid(alpha[0] * logits_pre + bias_pre) + pre_eps
    h_post = 2 * torch.sigmoid(alpha[1] * logits_post + bias_post)
    logits_res = (alpha[2] * logits_res + bias_res).unflatten(-1, (n, n))
    if sinkhorn_order == "rows_first":
        return h_pre, h_post, sinkhorn(logits_res.mT, iterations, sinkhorn_eps).mT
    return h_pre, h_post, sinkhorn(logits_res, iterations, sinkhorn_eps)


def _inverse_norm(v: Tensor, eps: float, form: str) -> Tensor:
    """[..., 1], what values [..., n*C] are multiplied with to have a root mean square of one."""
    if form == "inside_root":
        return torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    # the norm's own gradient is finite where v is zero
    rms = torch.linalg.vector_norm(v, dim=-1, keepdim=True) / math.sqrt(v.shape[-1])
    return 1 / (rms + eps)


def transpose_res_rows(parameter: Tensor, n: int) -> Tensor:
    """phi or bias with the n*n res rows reordered from [src, dst] to [dst, src], or back.

    DeepSeek-V4's checkpoints (and TileKernels) order them the other way round.

    Args:
        parameter: [n*n + 2n, ...].
    """
    gates, res = parameter.split([2 * n, n * n])
    return torch.cat([gates, res.unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)])


def hc_coefficients(
    x: Tensor, theta: Tensor, alpha: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients of unconstrained hyper-connections (paper eq. 5).

    Args:
        x: [..., n, C].
        theta: [n + 2, C]; rows: one for H_pre, one for H_post, n for H_res (one for each dst).
        alpha: [3].
        bias: [n*n + 2n], ordered as in `coefficients`.

    Returns:
        h_pre [..., n], h_post [..., n], h_res [..., n, n] (dst, src): any sign, any size.
    """
    v = x.to(accumulation_dtype(x))
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + HC_NORM_EPS)
    return hc_from_projection(v @ theta.t(), alpha, bias)


def hc_from_projection(
    projected: Tensor, alpha: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`hc_coefficients` from what theta makes of each normed stream, [..., n, n + 2]."""
    n = projected.shape[-2]
    mixed = torch.tanh(projected).transpose(-1, -2)  # [..., n + 2, n (the stream it came from)]
    bias_pre, bias_post, bias_res = bias.split([n, n, n * n])
    h_pre = alpha[0] * mixed[..., 0, :] + bias_pre
    h_post = alpha[1] * mixed[..., 1, :] + bias_post
    h_res = alpha[2] * mixed[..., 2:, :].flatten(-2) + bias_res
    return h_pre, h_post, h_res.unflatten(-1, (n, n))
