"""The definition of mHC in plain PyTorch: any device, any dtype, float64 included.

Every faster path must equal what stands here. Sources: "the paper" is Xie et al., mHC, arXiv
2512.24880; "HC" is Zhu et al., Hyper-Connections, arXiv 2409.19606.

Shapes: `...` are token dimensions, n the number of streams, C the width of one stream.
    x [..., n, C] the residual streams
    u [..., C] what a sublayer F reads, f [..., C] what it writes
H_res[dst, src] mixes stream src into stream dst. Coefficients are computed and returned in fp32
(float64 where x is float64); u and y come back in the dtype of x.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import Mixing

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


def aggregate(x: Tensor, h_pre: Tensor) -> Tensor:
    """u = H_pre x: what the sublayer reads (paper eq. 3, F's argument).

    Args:
        x: [..., n, C].
        h_pre: [..., n].

    Returns:
        u [..., C] in the dtype of x.
    """
    return (h_pre.unsqueeze(-1) * x.to(h_pre.dtype)).sum(-2).to(x.dtype)


def pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`coefficients` and `aggregate` together: all that happens in front of a sublayer.

    Args:
        options: the keywords of `coefficients`.

    Returns:
        u [..., C] in the dtype of x, h_post [..., n], h_res [..., n, n].
    """
    h_pre, h_post, h_res = coefficients(x, phi, alpha, bias, **options)
    return aggregate(x, h_pre), h_post, h_res


def combine(
    x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor, f_bias: Tensor | None = None
) -> Tensor:
    """y = H_res x + H_post^T (f + f_bias): the next streams (paper eq. 3).

    Args:
        x: [..., n, C], the streams that the site's `pre` read, or [..., n*C], stream after stream.
        f: [..., C], the sublayer's output; f_bias: [C], the bias it left for the residual, or None.
        h_post: [..., n].
        h_res: [..., n, n], indexed [dst, src].

    Returns:
        y in the shape and the dtype of x.
    """
    streams = _apart(x, f, h_post).to(h_res.dtype)
    f = f.to(h_res.dtype)
    if f_bias is not None:
        f = f + f_bias.to(h_res.dtype)
    y = h_res @ streams + h_post.unsqueeze(-1) * f.unsqueeze(-2)
    return y.to(x.dtype).reshape(x.shape)


def _apart(x: Tensor, f: Tensor, h_post: Tensor) -> Tensor:
    """Streams [..., n*C] as [..., n, C]; those that are so already, as they are."""
    return x.reshape(*h_post.shape, f.shape[-1])


def combine_pre(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    f_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One site's `combine` and the next site's `pre`: the boundary between two sites.

    x, f, h_post, h_res and f_bias belong to the site that ends; phi, alpha, bias and the options of
    `coefficients` to the next.

    Returns:
        y in the shape of x; u [..., C], h_post [..., n] and h_res [..., n, n] of the next site.
    """
    y = combine(x, f, h_post, h_res, f_bias)
    return y, *pre(_apart(y, f, h_post), phi, alpha, bias, **options)


def pre_with_h_pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`pre`, and the h_pre that it used: what `rebuild` wants, so it carries no gradient.

    Returns:
        u, h_post and h_res as `pre` returns them; h_pre [..., n].
    """
    h_pre, h_post, h_res = coefficients(x, phi, alpha, bias, **options)
    return aggregate(x, h_pre), h_post, h_res, h_pre.detach()


def combine_pre_with_h_pre(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    f_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`combine_pre`, and the h_pre of the next site: what `rebuild` wants, without a gradient.

    Returns:
        y, u, h_post and h_res as `combine_pre` returns them; h_pre [..., n].
    """
    y = combine(x, f, h_post, h_res, f_bias)
    return y, *pre_with_h_pre(_apart(y, f, h_post), phi, alpha, bias, **options)


def rebuild(
    x: Tensor,
    h_pre: Sequence[Tensor],
    ended: Sequence[Mixing],
    *,
    ys: Sequence[Tensor] | None = None,
    us: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The streams and u of consecutive sites again, without running a sublayer (paper 4.3.2).

    What it returns equals, bit for bit, what `pre` and `combine_pre` returned. Forward only.

    Args:
        x: [..., n, C], the streams that the first site read.
        h_pre: of every site [..., n].
        ended: what each site but the last left: its `combine` makes the streams of the next.
        ys, us: tensors to write the results into, or None for new ones.

    Returns:
        ys, the streams [..., n, C] that each site but the first read; us [..., C], of every site.
    """
    new_ys, new_us = [], [aggregate(x, h_pre[0])]
    for (f, h_post, h_res, f_bias), weights in zip(ended, h_pre[1:], strict=True):
        x = combine(x, f, h_post, h_res, f_bias)
        new_ys.append(x)
        new_us.append(aggregate(x, weights))
    for given, new in ((ys, new_ys), (us, new_us)):
        for old, result in zip(given or (), new, strict=given is not None):
            old.copy_(result)
    return list(ys or new_ys), list(us or new_us)


def transpose_res_rows(parameter: Tensor, n: int) -> Tensor:
    """phi or bias with the n*n res rows reordered from [src, dst] to [dst, src], or back.

    DeepSeek-V4's checkpoints (and TileKernels) order them the other way round.

    Args:
        parameter: [n*n + 2n, ...].
    """
    gates, res = parameter.split([2 * n, n * n])
    return torch.cat([gates, res.unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)])


def head(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    norm_eps: float = 1e-6,
    pre_eps: float = 1e-6,
) -> Tensor:
    """The learned end of a `deepseek_v4` model: a weighted sum of the streams.

    Args:
        x: [..., n, C].
        fn: [n, n*C]; scale: [1]; base: [n].
        norm_eps, pre_eps: as in `coefficients`.

    Returns:
        [..., C] in the dtype of x.
    """
    v = x.to(accumulation_dtype(x)).flatten(-2)
    inverse_r = torch.rsqrt(v.square().mean(-1, keepdim=True) + norm_eps)
    weights = torch.sigmoid(scale * (v @ fn.t()) * inverse_r + base) + pre_eps
    return aggregate(x, weights)


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
    n = x.shape[-2]
    v = x.to(accumulation_dtype(x))
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + HC_NORM_EPS)
    mixed = torch.tanh(v @ theta.t()).transpose(-1, -2)  # [..., n + 2, n (the stream it came from)]
    bias_pre, bias_post, bias_res = bias.split([n, n, n * n])
    h_pre = alpha[0] * mixed[..., 0, :] + bias_pre
    h_post = alpha[1] * mixed[..., 1, :] + bias_post
    h_res = alpha[2] * mixed[..., 2:, :] + bias_res.view(n, n)
    return h_pre, h_post, h_res
