"""What the coefficients and the streams of a model say: gains, errors, mixing.

Shapes: L sites of the whole model, T tokens of one microbatch on one rank, n streams of width C.
"""

import torch
from torch import Tensor

GRAM_TOKENS = 1024
"""Tokens whose streams stand in fp32 at once while their inner products are taken."""

Values = dict[str, Tensor]


def gains(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Amax gain magnitude of maps [..., n, n] (dst, src), as the paper defines it (section 3.1).

    It is the largest absolute value of a sum, not a sum of absolute values: what a signal that is
    the same in all streams, as it is at the entry, grows by. The two differ only where entries are
    negative (variant hc), and there the sum of absolute values, the infinity norm, is larger.

    Returns:
        forward [...]: max_i |sum_j M_ij| over rows, for the signal;
        backward [...]: max_j |sum_i M_ij| over columns, for the gradient.
    """
    return matrix.sum(-1).abs().amax(-1), matrix.sum(-2).abs().amax(-1)


def residual_metrics(h_res: Tensor) -> tuple[Values, Values]:
    """What the H_res of all sites say, in float64.

    Args:
        h_res: [L, T, n, n], the sites in the order of the model.

    Returns:
        Means over tokens and maxima over tokens, each value [L] (h_res [L, n, n]):
        gain_forward, gain_backward of the single site (both: mean and maximum);
        depth_gain_forward of the product of all sites from the entry up to this one,
        depth_gain_backward of the product from this site to the exit (both: mean and maximum);
        row_error, column_error, the largest |sum - 1| (maximum);
        to_identity, to_uniform, Frobenius distances (mean); entropy of a row, |H| divided by its
        row sum, in nats (mean over rows and tokens); h_res (mean).
    """
    h = h_res.double()
    n = h.shape[-1]
    identity = torch.eye(n, dtype=h.dtype, device=h.device)
    forward, backward = gains(h)
    depth_forward, depth_backward = torch.empty_like(forward), torch.empty_like(backward)
    product = identity
    for site in range(len(h)):
        product = h[site] @ product
        depth_forward[site] = gains(product)[0]
    product = identity
    for site in reversed(range(len(h))):
        product = product @ h[site]
        depth_backward[site] = gains(product)[1]
    both = {
        "gain_forward": forward,
        "gain_backward": backward,
        "depth_gain_forward": depth_forward,
        "depth_gain_backward": depth_backward,
    }
    size = h.abs()
    weights = size / size.sum(-1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
    means = {
        **{f"{name}_mean": value.mean(1) for name, value in both.items()},
        "to_identity": (h - identity).norm(dim=(-2, -1)).mean(1),
        "to_uniform": (h - 1 / n).norm(dim=(-2, -1)).mean(1),
        "entropy": torch.special.entr(weights).sum(-1).mean((1, 2)),
        "h_res": h.mean(1),
    }
    maxima = {
        **{f"{name}_max": value.amax(1) for name, value in both.items()},
        "row_error": (h.sum(-1) - 1).abs().amax((1, 2)),
        "column_error": (h.sum(-2) - 1).abs().amax((1, 2)),
    }
    return means, maxima


def stream_geometry(x: Tensor) -> tuple[Tensor, Tensor]:
    """Streams x [T, n, C] -> their L2 norms [n] and mean pairwise cosine [], means over tokens.

    One stream has no pair: its cosine is given as 1.
    """
    gram = torch.cat([part.float() @ part.float().mT for part in x.split(GRAM_TOKENS)]).double()
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    n = x.shape[-2]
    if n == 1:
        return norms.mean(0), norms.new_ones(())
    tiny = torch.finfo(norms.dtype).tiny
    cosines = gram / (norms.unsqueeze(-1) * norms.unsqueeze(-2)).clamp_min(tiny)
    first, second = torch.triu_indices(n, n, offset=1, device=x.device)
    return norms.mean(0), cosines[:, first, second].mean()
