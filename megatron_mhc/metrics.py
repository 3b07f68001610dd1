"""What mHC does inside a model in one training step: gains, errors, mixing, over all ranks.

Shapes: L sites of the whole model, T tokens of one microbatch on one rank, n streams of width C.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mhc import kernels

from .connection import HyperConnection
from .parameters import is_hyper_connection

GRAM_TOKENS = 1024
"""Tokens whose streams stand in fp32 at once while their inner products are taken."""

Values = dict[str, Tensor]


def gains(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Amax gain of maps [..., n, n] (dst, src), as the paper measures stability (section 3.1).

    Returns:
        forward [...]: the largest absolute row sum, max_i sum_j |M_ij|, the most that a signal can
        grow; backward [...]: the largest absolute column sum, the most that a gradient can.
    """
    size = matrix.abs()
    return size.sum(-1).amax(-1), size.sum(-2).amax(-1)


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


def site_coefficients(connection: HyperConnection, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre [..., n], H_post [..., n], H_res [..., n, n] of a site for streams x [..., n, C]."""
    mhc = connection.mhc
    if mhc.variant == "hc":
        return kernels.hc_coefficients(x, connection.theta, connection.alpha, connection.bias)
    return kernels.coefficients(
        x,
        connection.phi,
        connection.alpha,
        connection.bias,
        iterations=mhc.sinkhorn_iterations,
        norm_eps=mhc.norm_eps,
        pre_eps=mhc.pre_eps,
        sinkhorn_eps=mhc.sinkhorn_eps,
        backend=mhc.backend,
    )


def connections(chunks: Iterable[torch.nn.Module]) -> dict[int, HyperConnection]:
    """The sites of these model chunks, by index from the start of the whole model."""
    from .layer import MHCLayer

    found = {}
    for chunk in chunks:
        for layer in chunk.modules():
            if isinstance(layer, MHCLayer):
                first = 2 * (layer.layer_number - 1)
                found[first] = layer.attention_connection
                found[first + 1] = layer.mlp_connection
    return dict(sorted(found.items()))


class Recorder:
    """Records every site of this rank once: in the first forward inside the `with` statement.

    Forward hooks that exist only meanwhile take the streams that each site read, on the fused path
    (where `HyperConnection` returns them) as on the other, and compute its coefficients anew: a
    model that is not being recorded runs no line of this. Later microbatches and the recomputed
    forwards of the first one find their sites recorded already.

    Args:
        chunks: the model chunks of this rank, wrapped or not.
    """

    def __init__(self, chunks: list[torch.nn.Module]) -> None:
        self.chunks = chunks
        self.connections = connections(chunks)
        self.h_res: dict[int, Tensor] = {}
        self.streams: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "Recorder":
        indices = {connection: site for site, connection in self.connections.items()}

        @torch.no_grad()
        def record(connection: HyperConnection, _: Any, output: tuple[Tensor, ...]) -> None:
            site = indices[connection]
            if site in self.h_res:
                return
            x = output[0].detach().flatten(0, -3)
            h_pre, h_post, self.h_res[site] = site_coefficients(connection, x)
            norms, cosine = stream_geometry(x)
            parts = [h_pre.double().mean(0), h_post.double().mean(0), norms, cosine.view(1)]
            self.streams[site] = torch.cat(parts)

        self._hooks = [c.register_forward_hook(record) for c in self.connections.values()]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def summary(self, step: int, optimizer: Any = None) -> dict[str, Any]:
        """The metrics of the whole model: a collective that every rank calls, after the backward.

        Args:
            step: the training step that was recorded.
            optimizer: Megatron's, whose shards of the gradients count where it is distributed.

        Returns:
            step, variant, num_streams, sites [L], gradient_norm (L2, of all parameters of mHC,
            before clipping), site (name -> [L] or [L, n]) and h_res [L, n, n], as plain lists.
            Means and maxima go over the tokens of the first microbatch of every data rank. The
            names are those of `residual_metrics`, and h_pre, h_post, stream_norm [L, n],
            stream_cosine and gradient_norm [L].

        Raises:
            RuntimeError: a site of this rank did not run inside the `with` statement.
        """
        missing = [site for site in self.connections if site not in self.h_res]
        if missing or not self.connections:
            raise RuntimeError(f"mHC's metrics saw no forward of the sites {missing or 'at all'}")
        mhc = next(iter(self.connections.values())).mhc
        squares, total = gradient_squares(self.chunks, self.connections, optimizer)
        own = list(self.connections)
        h_res = torch.stack([self.h_res[site] for site in own])
        streams = torch.stack([self.streams[site] for site in own])
        sites, (h_res, streams, squares) = gather_stages(own, h_res, streams, squares)
        n = mhc.num_streams
        means, maxima = residual_metrics(h_res)
        names = ("h_pre", "h_post", "stream_norm", "stream_cosine")
        parts = streams.split([n, n, n, 1], dim=-1)
        means |= dict(zip(names, (*parts[:3], parts[3].squeeze(-1)), strict=True))
        means, maxima = over_all_ranks(means, maxima)
        # equal on all data and tensor ranks: summed by `gradient_squares` and by Megatron
        values = means | maxima | {"gradient_norm": squares.sqrt()}
        matrices = values.pop("h_res")
        return {
            "step": step,
            "variant": mhc.variant,
            "num_streams": n,
            "sites": sites,
            "gradient_norm": total.sqrt().item(),
            "site": {name: value.tolist() for name, value in values.items()},
            "h_res": matrices.tolist(),
        }


def gradient_squares(
    chunks: list[torch.nn.Module], sites: dict[int, HyperConnection], optimizer: Any
) -> tuple[Tensor, Tensor]:
    """Sums of squared gradients: of each of this rank's sites [l], and of all of mHC's [].

    The gradients are those before clipping, without the loss scale.
    """
    from megatron.core import parallel_state
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    sharded = [o for o in chained if isinstance(o, DistributedOptimizer)]

    def square(parameter: torch.nn.Parameter) -> Tensor:
        gradient = getattr(parameter, "main_grad", parameter.grad)
        if gradient is None:
            return torch.zeros((), dtype=torch.float64, device=parameter.device)
        if not sharded:
            return gradient.double().square().sum()
        # the rest of the buffer is not reduced: it belongs to other ranks
        flat, whole = gradient.view(-1), gradient.new_zeros((), dtype=torch.float64)
        for one in sharded:
            if parameter in one.model_param_gbuf_map:
                own = one._get_model_param_range_map(parameter)["param"]
                whole += flat[own.start : own.end].double().square().sum()
        return whole

    every = [p for chunk in chunks for p in chunk.parameters() if is_hyper_connection(p)]
    groups = [list(connection.parameters()) for connection in sites.values()]
    sums = torch.stack(
        [torch.stack([square(p) for p in group]).sum() for group in (*groups, every)]
    )
    if sharded:
        dist.all_reduce(sums, group=sharded[0].data_parallel_group)
    if optimizer is not None:
        sums = sums / optimizer.get_loss_scale().double().square().to(sums.device)
    total = sums[-1].clone()
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return sums[:-1], total


def gather_stages(sites: list[int], *tensors: Tensor) -> tuple[list[int], list[Tensor]]:
    """Put what the pipeline's stages hold together, in the order of the sites, on every stage.

    Args:
        sites: the l sites of this stage, by index; stages may have different numbers of them, and
            chunks of an interleaved pipeline any order.
        tensors: each [l, ...].

    Returns:
        All L sites in order, and the tensors [L, ...].
    """
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return sites, list(tensors)
    stages: list[Any] = [None] * group.size()
    dist.all_gather_object(stages, sites, group=group)
    found = [site for stage in stages for site in stage]
    order = sorted(range(len(found)), key=found.__getitem__)
    whole = []
    for tensor in tensors:
        parts = []
        for stage, theirs in enumerate(stages):
            part = tensor.new_empty((len(theirs), *tensor.shape[1:]))
            if stage == group.rank():
                part = tensor.contiguous()
            dist.broadcast(part, dist.get_global_rank(group, stage), group=group)
            parts.append(part)
        whole.append(torch.cat(parts)[order])
    return [found[i] for i in order], whole


def over_all_ranks(means: Values, maxima: Values) -> tuple[Values, Values]:
    """Means of the means and maxima of the maxima over every rank; a maximum that is NaN is inf.

    Each rank has the same shapes: `gather_stages` came first, and ranks have equally many tokens.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return means, {name: value.nan_to_num(nan=torch.inf) for name, value in maxima.items()}
    reduced = []
    for values, operation in ((means, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
        flat = torch.cat([value.flatten() for value in values.values()])
        if operation == dist.ReduceOp.SUM:
            flat = flat / dist.get_world_size()
        else:
            flat = flat.nan_to_num(nan=torch.inf, posinf=torch.inf)
        dist.all_reduce(flat, operation)
        parts = flat.split([value.numel() for value in values.values()])
        shaped = (part.view_as(v) for part, v in zip(parts, values.values(), strict=True))
        reduced.append(dict(zip(values, shaped, strict=True)))
    return reduced[0], reduced[1]
