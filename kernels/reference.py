"""The definition of mHC in plain PyTorch: any device, any dtype, float64 included.

Every faster path must equal what stands here, and in `mappings`, whose functions are here too.
Sources: "the paper" is Xie et al., mHC, arXiv 2512.24880; "HC" is Zhu et al., Hyper-Connections,
arXiv 2409.19606.

Shapes: `...` are token dimensions, n the number of streams, C the width of one stream.
    x [..., n, C] the residual streams
    u [..., C] what a sublayer F reads, f [..., C] what it writes
H_res[dst, src] mixes stream src into stream dst. Coefficients are computed and returned in fp32
(float64 where x is float64); u and y come back in the dtype of x.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import Mixing
from .mappings import HC_NORM_EPS as HC_NORM_EPS
from .mappings import accumulation_dtype, coefficients
from .mappings import hc_coefficients as hc_coefficients
from .mappings import sinkhorn as sinkhorn
from .mappings import transpose_res_rows as transpose_res_rows


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


def combine_read(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    h_pre: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    f_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The boundary between two delayed sites (DeepSeek-V4.1): the next one reads with the H_pre of
    the one that ends, which is known before y is, so one pass over the streams makes y and u.

    x, f, h_post, h_res, h_pre and f_bias belong to the site that ends (h_pre [..., n], in the dtype
    of h_post); phi, alpha, bias and the options of `coefficients` to the next.

    Returns:
        y in the shape of x; u = h_pre y [..., C], from the y that was rounded; h_pre [..., n],
        h_post [..., n] and h_res [..., n, n] of the next site, from the same y.
    """
    y = combine(x, f, h_post, h_res, f_bias)
    streams = _apart(y, f, h_post)
    return y, aggregate(streams, h_pre), *coefficients(streams, phi, alpha, bias, **options)


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
