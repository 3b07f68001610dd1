"""Recording one training step: every site's coefficients and gradients, over all ranks.

Shapes: L sites of the whole model, T tokens of one microbatch on one rank, n streams of width C.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mhc import kernels
from megatron_mhc.model.connection import HyperConnection, SiteInput
from megatron_mhc.model.parameters import is_hyper_connection

from .formulas import Values, residual_metrics, stream_geometry


def h_pre_of(connection: HyperConnection, x: Tensor) -> Tensor:
    """H_pre [..., n] of a site for streams x [..., n, C]: the one that a site's forward hides."""
    if connection.mhc.variant == "hc":
        parameters = (connection.theta, connection.alpha, connection.bias)
        return kernels.hc_coefficients(x, *parameters, backend=connection.mhc.backend)[0]
    parameters = (connection.phi, connection.alpha, connection.bias)
    return kernels.coefficients(x, *parameters, **connection.options)[0]


def connections(chunks: Iterable[torch.nn.Module]) -> dict[int, HyperConnection]:
    """The sites of these model chunks, by index from the start of the whole model.

    Without those of multi-token prediction, which are no part of the product over depth.
    """
    from megatron_mhc.model.layer import MHCLayer

    found = {}
    for chunk in chunks:
        for layer in chunk.modules():
            if isinstance(layer, MHCLayer) and not layer.is_mtp:
                for index, site in enumerate(layer.sites, layer.first_index):
                    found[index] = site.connection
    return dict(sorted(found.items()))


class Recorder:
    """Records every site of this rank once: in the first forward inside the `with` statement.

    Forward hooks that exist only meanwhile take what `HyperConnection` returns, fused with the site
    before or not: the streams that the site reads, its H_post and H_res. A model that is not being
    recorded runs no line of this. Later microbatches, and forwards that are recomputed in the
    backward, find their sites recorded already.

    Args:
        chunks: the model chunks of this rank, wrapped or not.
    """

    def __init__(self, chunks: list[torch.nn.Module]) -> None:
        self.chunks = chunks
        self.connections = connections(chunks)
        self.h_res: dict[int, Tensor] = {}
        self.summaries: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "Recorder":
        indices = {connection: site for site, connection in self.connections.items()}

        @torch.no_grad()
        def record(connection: HyperConnection, _: Any, site_input: SiteInput) -> None:
            site = indices[connection]
            if site in self.h_res:
                return
            x = site_input.x.reshape(-1, connection.mhc.num_streams, connection.hidden_size)
            self.h_res[site] = site_input.h_res.flatten(0, -3)
            gates = (h_pre_of(connection, x), site_input.h_post.flatten(0, -2))
            norms, cosine = stream_geometry(x)
            means = [gate.double().mean(0) for gate in gates]
            self.summaries[site] = torch.cat([*means, norms, cosine.view(1)])

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
        mhc = of_any_stage(next((c.mhc for c in self.connections.values()), None))
        if missing or mhc is None:
            raise RuntimeError(
                f"--mhc-log-interval: no forward of the sites {missing or '(there are none)'} ran"
                " in this step, so there is nothing to log of them: if the script drops layers or"
                " runs them outside the training step, turn the metrics off"
            )
        squares, total = gradient_squares(self.chunks, self.connections, optimizer)
        own = list(self.connections)
        recorded = [[values[site] for site in own] for values in (self.h_res, self.summaries)]
        parts_of_model = [torch.stack(values) if values else None for values in recorded]
        sites, (h_res, streams, squares) = gather_stages(own, *parts_of_model, squares)
        n = mhc.num_streams
        means, maxima = residual_metrics(h_res)
        names = ("h_pre", "h_post", "stream_norm", "stream_cosine")
        parts = streams.split([n, n, n, 1], dim=-1)
        means |= dict(zip(names, (*parts[:3], parts[3].squeeze(-1)), strict=True))
        ranks = dist.get_world_size()
        means = over_all_ranks({k: v / ranks for k, v in means.items()}, dist.ReduceOp.SUM)
        # a maximum forgets a NaN, or not, as the backend likes: infinity is seen by both
        finite = {k: v.nan_to_num(torch.inf, posinf=torch.inf) for k, v in maxima.items()}
        maxima = over_all_ranks(finite, dist.ReduceOp.MAX)
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
    none = torch.zeros((), dtype=torch.float64, device="cuda")
    sums = torch.stack([sum(map(square, group), start=none) for group in (*groups, every)])
    if sharded:
        dist.all_reduce(sums, group=sharded[0].data_parallel_group)
    if optimizer is not None:
        sums = sums / optimizer.get_loss_scale().double().square().to(sums.device)
    total = sums[-1].clone()
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return sums[:-1], total


def of_any_stage[T](value: T | None) -> T | None:
    """What the first of the pipeline's stages has that has anything."""
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    values: list[T | None] = [value] * group.size()
    if group.size() > 1:
        dist.all_gather_object(values, value, group=group)
    return next((one for one in values if one is not None), None)


def gather_stages(sites: list[int], *tensors: Tensor | None) -> tuple[list[int], list[Tensor]]:
    """Put what the pipeline's stages hold together, in the order of the sites, on every stage.

    Args:
        sites: the l sites of this stage, by index; stages may have different numbers of them, also
            none, and chunks of an interleaved pipeline any order.
        tensors: each [l, ...]; None where there are no sites.

    Returns:
        All L sites in order, and the tensors [L, ...].
    """
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return sites, [tensor for tensor in tensors if tensor is not None]
    kinds = [None if tensor is None else (tensor.shape[1:], tensor.dtype) for tensor in tensors]
    stages: list[Any] = [None] * group.size()
    dist.all_gather_object(stages, (sites, kinds), group=group)
    found = [site for theirs, _ in stages for site in theirs]
    order = sorted(range(len(found)), key=found.__getitem__)
    whole = []
    for index, tensor in enumerate(tensors):
        shape, dtype = next(kinds[index] for _, kinds in stages if kinds[index] is not None)
        parts = []
        for stage, (theirs, _) in enumerate(stages):
            part = torch.empty((len(theirs), *shape), dtype=dtype, device="cuda")
            if stage == group.rank() and tensor is not None:
                part = tensor.contiguous()
            dist.broadcast(part, dist.get_global_rank(group, stage), group=group)
            parts.append(part)
        whole.append(torch.cat(parts)[order])
    return [found[i] for i in order], whole


def over_all_ranks(values: Values, operation: dist.ReduceOp.RedOpType) -> Values:
    """Each value's SUM or MAX over every rank; all ranks have the same names and shapes."""
    flat = torch.cat([value.flatten() for value in values.values()])
    dist.all_reduce(flat, operation)
    parts = flat.split([value.numel() for value in values.values()])
    return {
        name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)
    }
