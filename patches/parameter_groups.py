"""Patches of megatron.core.optimizer: marked parameters get no weight decay and never see Muon."""

import functools
from collections.abc import Callable
from typing import Any

from .registry import Patch


def parameter_group_patches(mark: str) -> tuple[Patch, ...]:
    """Rules for parameters that have a true attribute `mark`.

    phi is a matrix, so by Megatron's own rules it would be decayed, and orthogonalised by Muon;
    it is the weight of a gate, for which both are wrong.
    """

    def groups(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _get_param_groups(chunks: Any, config: Any, config_overrides: Any) -> Any:
            from megatron.core.optimizer.optimizer_config import ParamKey

            # with start and end a group of its own, which holds fp32 alone: where a group mixes
            # dtypes, Megatron's checkpoints of it do not fit (issue 5835)
            rule: dict[str, Any] = {"wd_mult": 0.0, "start_wd": 0.0, "end_wd": 0.0}
            # a matrix optimizer (Muon) names the one that takes what is no matrix
            others = {o["optimizer"] for o in (config_overrides or {}).values() if "optimizer" in o}
            if others:
                (rule["optimizer"],) = others
            return original(chunks, config, {**(config_overrides or {}), ParamKey(attr=mark): rule})

        return _get_param_groups

    def layer_wise(original: Callable[..., bool]) -> Callable[..., bool]:
        @functools.wraps(original)
        def is_managed_by_layer_wise_optimizer(param: Any) -> bool:
            return original(param) and not getattr(param, mark, False)

        return is_managed_by_layer_wise_optimizer

    core = "megatron.core.optimizer"
    muon = "is_managed_by_layer_wise_optimizer"
    why = "keeps phi out of Muon's layer-wise buffers"
    return (
        Patch(
            id="parameter-groups",
            target=f"{core}:_get_param_groups",
            replace=groups,
            why="takes mHC's parameters out of weight decay and Muon",
        ),
        # Megatron imports the function by name, so it stands in two modules
        Patch("muon-layout", f"{core}.layer_wise_optimizer:{muon}", layer_wise, why, optional=True),
        Patch("muon-layout-import", f"{core}:{muon}", layer_wise, why, optional=True),
    )
