"""Megatron's distributed optimizer, where some parameters are fp32 themselves.

It detaches a bf16 parameter's shard and forgets it for an fp32 one. A view inside autograd takes no
value in place, so no checkpoint of the default format or the legacy one; and PyTorch makes no
optimizer of it, so `--optimizer-cpu-offload`, which makes some, stops.

There each parameter has a copy in fp32 that is stepped, but for one that is fp32: on the device it
is handed no gradient and stays as it is, and no checkpoint of it comes back.
"""

import functools
from typing import Any

import torch

from .registry import Patch

_FP32_SHARDS = 3
"""Their place in what Megatron returns: lists, one for each parameter group."""


def _detached(shard: torch.Tensor) -> torch.Tensor:
    """The same memory and the same marks, as a leaf."""
    leaf = shard.detach()
    vars(leaf).update(vars(shard))
    return leaf


def _outside_autograd(original: Any) -> Any:
    build = original.__func__

    @functools.wraps(build)
    def _build_model_and_main_param_groups(
        cls: type, gbuf_ranges: Any, param_gbuf_map: Any, opt_group_ranges: Any, *more: Any
    ) -> Any:
        built = build(cls, gbuf_ranges, param_gbuf_map, opt_group_ranges, *more)
        for group_range, shards in zip(opt_group_ranges, built[_FP32_SHARDS], strict=True):
            leaves = {id(shard): _detached(shard) for shard in shards}
            group = group_range["orig_group"]
            group["params"] = [leaves.get(id(p), p) for p in group["params"]]
            shards[:] = leaves.values()
        return built

    return classmethod(_build_model_and_main_param_groups)


def _with_copies(original: Any) -> Any:
    @functools.wraps(original)
    def split(self: Any, offload_fraction: float) -> Any:
        found = original(self, offload_fraction)
        _, on_device, host_copies, _, fp32_copies = found
        if not self.param_update_in_fp32:
            return found
        made = {id(copy) for copy in fp32_copies.values()}
        for group in on_device:
            for index, parameter in enumerate(group["params"]):
                if id(parameter) not in made:
                    group["params"][index] = fp32_copies[parameter] = parameter.detach().clone()
        for parameter, copy in host_copies.items():
            fp32_copies.setdefault(parameter, copy)
        return found

    return split


def fp32_shards_patches() -> tuple[Patch, ...]:
    """For every model with mHC, whose own parameters are fp32 beside bf16 ones."""
    return (
        Patch(
            id="fp32-shards",
            target="megatron.core.optimizer.distrib_optimizer:"
            "DistributedOptimizer._build_model_and_main_param_groups",
            replace=_outside_autograd,
            why="the distributed optimizer loads, and offloads, fp32 parameters beside bf16 ones",
        ),
        Patch(
            id="fp32-offload",
            target="megatron.core.optimizer.cpu_offloading.hybrid_optimizer:"
            "HybridDeviceOptimizer._get_sub_optimizer_param_groups",
            replace=_with_copies,
            why="an optimizer that is offloaded in part steps fp32 parameters too",
            optional=True,
        ),
    )
