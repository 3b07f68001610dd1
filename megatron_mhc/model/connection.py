"""HyperConnection: phi, alpha and bias of one site, and the head that may end a model."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_mhc import kernels
from megatron_mhc.config import MHCConfig

from .parameters import Fp32Module

ALPHA_START = 0.01
"""alpha at the start (paper, appendix A.1)."""
HOME_LOGIT = 3.0
"""b_pre of a site's home stream under init "residual": sigmoid(3) = 0.953 of u comes from there."""
IDENTITY_LOGIT = 3.0
"""b_res under init "residual": +3 on the diagonal, -3 off it; H_res starts near the identity."""
ONE_STREAM_LOGIT = 30.0
"""b_pre where there is one stream: sigmoid(30) is 1 to fp32's rounding."""


def _home_logits(n: int, site: int) -> Tensor:
    """b_pre of init "residual": the weights of a site's streams sum to one, most on one of them."""
    if n == 1:
        return torch.tensor([ONE_STREAM_LOGIT])
    home_weight = 1 / (1 + math.exp(-HOME_LOGIT))
    weights = torch.full((n,), (1 - home_weight) / (n - 1), dtype=torch.float64)
    weights[site % n] = home_weight
    return torch.logit(weights)


def initial_bias(mhc: MHCConfig, site: int) -> Tensor:
    """[n*n + 2n]: b_pre, b_post and b_res of a site at the start (`MHCConfig.init`).

    The home stream of b_pre is that of the site which reads with it: of the next one where sites
    are delayed.

    Under "residual" the network computes the ordinary residual network's function at step 0: H_pre
    sums to one over streams that are still equal, H_post is 1, and H_res keeps their mean.
    """
    n = mhc.num_streams
    if mhc.variant == "hc":
        home = torch.zeros(n)
        home[site % n] = 1.0
        return torch.cat([home, torch.ones(n), torch.eye(n).flatten()])
    if mhc.init == "zero":
        return torch.zeros(n * n + 2 * n)
    near_identity = IDENTITY_LOGIT * (2 * torch.eye(n) - 1)
    return torch.cat([_home_logits(n, site + mhc.delayed), torch.zeros(n), near_identity.flatten()])


class SiteInput(NamedTuple):
    """What stands in front of a sublayer: the streams [..., n*C] that its site reads, and what
    comes of them.

    h_pre, outside the graph, is what made u, and there for selective recompute alone. next_pre
    [..., n] is there where sites are delayed: what the next site reads with.
    """

    x: Tensor
    u: Tensor
    h_post: Tensor
    h_res: Tensor
    h_pre: Tensor | None = None
    next_pre: Tensor | None = None


class HyperConnection(Fp32Module):
    """The hyper-connection of one site: how a sublayer reads the streams and writes to them.

    Args:
        mhc: the settings.
        hidden_size: C, the width of one stream.
        site: the site's index from the model's start; picks its home stream.
        sequence_parallel: whether tensor-parallel ranks see different tokens.

    Attributes:
        options: the keywords of `kernels.coefficients`, and `backend`.

    Parameters (fp32 whatever the model is in; replicated over all ranks):
        phi [n*n + 2n, n*C] (variant "hc": theta [n + 2, C]), alpha [3], bias [n*n + 2n].
    """

    phi: torch.nn.Parameter
    theta: torch.nn.Parameter
    alpha: torch.nn.Parameter
    bias: torch.nn.Parameter

    def __init__(
        self, mhc: MHCConfig, hidden_size: int, site: int, *, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.mhc = mhc
        self.hidden_size = hidden_size
        self.site = site
        self.options: dict[str, Any] = {
            "iterations": mhc.sinkhorn_iterations,
            "norm_eps": mhc.norm_eps,
            "pre_eps": mhc.pre_eps,
            "sinkhorn_eps": mhc.sinkhorn_eps,
            "norm_form": mhc.norm_form,
            "sinkhorn_order": mhc.sinkhorn_order,
            "backend": mhc.backend,
        }
        self._add_parameters(sequence_parallel=sequence_parallel)

    def _start(self) -> dict[str, Tensor]:
        n, width = self.mhc.num_streams, self.hidden_size
        projection = {"phi": torch.zeros(n * n + 2 * n, n * width)}
        if self.mhc.variant == "hc":
            projection = {"theta": torch.zeros(n + 2, width)}
        alpha = torch.full((3,), ALPHA_START)
        return {**projection, "alpha": alpha, "bias": initial_bias(self.mhc, self.site)}

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return f"{self.mhc.variant}, num_streams={self.mhc.num_streams}, C={self.hidden_size}"

    def forward(
        self, x: Tensor, mixing: kernels.Mixing | None = None, h_pre: Tensor | None = None
    ) -> SiteInput:
        """What stands in front of the sublayer: `kernels.pre`, or `kernels.combine_pre`.

        Args:
            x: [..., n*C], the streams; those of the site before where `mixing` is given.
            mixing: what that site leaves, whose `combine` is then done here too, in one pass.
            h_pre: [..., n], of that site, which a delayed one reads with; else None.

        Returns:
            The streams [..., n*C] that this site reads (x itself without `mixing`); u [..., C] for
            the sublayer; h_post [..., n] and h_res [..., n, n] for this site's own `combine`; and
            under selective recompute h_pre [..., n]; and of a delayed site next_pre [..., n].
        """
        if self.mhc.variant == "hc":
            return self._unconstrained(x, mixing)
        if self.mhc.delayed:
            assert h_pre is not None
            return self._delayed(x, mixing, h_pre)
        parameters = (self.phi, self.alpha, self.bias)
        keep = self.mhc.recompute is not None
        if mixing is None:
            pre = kernels.pre_with_h_pre if keep else kernels.pre
            return SiteInput(x, *pre(self._apart(x), *parameters, **self.options))
        f, h_post, h_res, f_bias = mixing
        mixed = (x, f, h_post, h_res, *parameters)
        combine_pre = kernels.combine_pre_with_h_pre if keep else kernels.combine_pre
        return SiteInput(*combine_pre(*mixed, f_bias=f_bias, **self.options))

    def _delayed(self, x: Tensor, mixing: kernels.Mixing | None, h_pre: Tensor) -> SiteInput:
        parameters = (self.phi, self.alpha, self.bias)
        if mixing is None:
            streams = self._apart(x)
            u = kernels.aggregate(streams, h_pre, backend=self.mhc.backend)
            next_pre, h_post, h_res = kernels.coefficients(streams, *parameters, **self.options)
        else:
            f, h_post, h_res, f_bias = mixing
            x, u, next_pre, h_post, h_res = kernels.combine_read(
                x, f, h_post, h_res, h_pre, *parameters, f_bias=f_bias, **self.options
            )
        kept = None if self.mhc.recompute is None else h_pre.detach()
        return SiteInput(x, u, h_post, h_res, kept, next_pre)

    def _unconstrained(self, x: Tensor, mixing: kernels.Mixing | None) -> SiteInput:
        backend = self.mhc.backend
        if mixing is not None:
            x = kernels.combine(x, *mixing, backend=backend)
        streams = self._apart(x)
        parameters = (self.theta, self.alpha, self.bias)
        h_pre, h_post, h_res = kernels.hc_coefficients(streams, *parameters, backend=backend)
        return SiteInput(x, kernels.aggregate(streams, h_pre, backend=backend), h_post, h_res)

    def _apart(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.mhc.num_streams, -1))


class Head(Fp32Module):
    """The learned end of a model, as DeepSeek-V4's (`kernels.head`).

    Parameters (fp32): fn [n, n*C], scale [1], base [n]. It starts as the mean of the streams.
    """

    fn: torch.nn.Parameter
    scale: torch.nn.Parameter
    base: torch.nn.Parameter

    def __init__(
        self, mhc: MHCConfig, hidden_size: int, *, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.mhc = mhc
        self.hidden_size = hidden_size
        self._add_parameters(sequence_parallel=sequence_parallel)

    def _start(self) -> dict[str, Tensor]:
        n = self.mhc.num_streams
        mean_logit = torch.logit(torch.tensor(1 / n)) if n > 1 else torch.tensor(ONE_STREAM_LOGIT)
        return {
            "fn": torch.zeros(n, n * self.hidden_size),
            "scale": torch.ones(1),
            "base": mean_logit.expand(n).clone(),
        }

    def forward(self, x: Tensor) -> Tensor:
        """[..., n, C] -> [..., C]."""
        mhc = self.mhc
        return kernels.head(
            x,
            self.fn,
            self.scale,
            self.base,
            norm_eps=mhc.norm_eps if mhc.head_eps is None else mhc.head_eps,
            pre_eps=mhc.pre_eps if mhc.head_eps is None else mhc.head_eps,
            backend=mhc.backend,
        )
