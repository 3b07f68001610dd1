"""Patches of the bf16 optimizer's distributed checkpoint, where some parameters are fp32.

`Float16OptimizerWithFloat16Params.sharded_state_dict` numbers the bf16 parameters alone, while the
optimizer's state numbers the fp32 ones among them: states swap places, or the shapes do not fit
and it stops (Megatron-LM issue 5835). From 0.20 on it numbers all, but a group of fp32 parameters
alone, which has an empty list of copies, does not come back. The distributed optimizer numbers them
rightly.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

from .registry import Patch, is_there, locate
from .supported_versions import is_installed

_COPIES = "fp32_from_fp16_params"
"""The checkpoint's key for the fp32 copies, a list for each parameter group."""
_in_order: ContextVar[list[Any] | None] = ContextVar("parameters_in_order", default=None)


def parameters_in_order(optimizer: Any) -> list[Any]:
    """The model's parameters in the order of the optimizer's state.

    Args:
        optimizer: a Float16OptimizerWithFloat16Params; its groups hold fp32 copies of bf16
            parameters, and fp32 parameters themselves.
    """
    model_parameter = {
        id(copy): parameter
        for copies, parameters in zip(
            optimizer.fp32_from_float16_groups, optimizer.float16_groups, strict=True
        )
        for copy, parameter in zip(copies, parameters, strict=True)
    }
    groups = optimizer.optimizer.param_groups
    return [model_parameter.get(id(p), p) for group in groups for p in group["params"]]


def _number_all(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _in_order.set(parameters_in_order(self))
        try:
            return original(self, *args, **kwargs)
        finally:
            _in_order.reset(token)

    return sharded_state_dict


def _leave_empty_groups_out(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(self, *args, **kwargs)
        # the checkpoint's reader does not put empty lists back where they stood
        state[_COPIES] = [group for group in state[_COPIES] if group]
        return state

    return sharded_state_dict


def _put_empty_groups_back(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state: dict[str, Any]) -> Any:
        groups = self.fp32_from_float16_groups
        if len(state.get(_COPIES, groups)) < len(groups):
            saved = iter(state[_COPIES])
            state = {**state, _COPIES: [next(saved) if group else [] for group in groups]}
        return original(self, state)

    return load_state_dict


def _take_all(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_param_id_to_sharded_param_map(state: Any, parameters: Iterable[Any]) -> Any:
        return original(state, _in_order.get() or parameters)

    return get_param_id_to_sharded_param_map


def _tell_decay_apart(original: Any) -> Any:
    reorder = original.__func__

    def with_decay(group: dict[str, Any]) -> dict[str, Any]:
        return {**group, "wd_mult": (group["wd_mult"], group.get("start_wd"), group.get("end_wd"))}

    @functools.wraps(reorder)
    def _filter_and_reorder_param_groups(current: list[Any], saved: list[Any]) -> list[Any]:
        groups = reorder([with_decay(g) for g in current], [with_decay(g) for g in saved])
        return [{**group, "wd_mult": group["wd_mult"][0]} for group in groups]

    return staticmethod(_filter_and_reorder_param_groups)


_OPTIMIZER = "megatron.core.optimizer.optimizer"

_SAVE = f"{_OPTIMIZER}:Float16OptimizerWithFloat16Params.sharded_state_dict"

_NUMBERING = (
    Patch(
        id="optimizer-checkpoint",
        target=_SAVE,
        replace=_number_all,
        why="a checkpoint of bf16 and fp32 parameters keeps each one's optimizer state",
    ),
    Patch(
        id="optimizer-checkpoint-map",
        target=f"{_OPTIMIZER}:get_param_id_to_sharded_param_map",
        replace=_take_all,
        why="takes the numbering of optimizer-checkpoint",
    ),
)
_PATCHES = (
    Patch(
        id="optimizer-checkpoint-empty",
        target=_SAVE,
        replace=_leave_empty_groups_out,
        why="a group of fp32 parameters has no fp32 copies to save",
    ),
    Patch(
        id="optimizer-checkpoint-load",
        target=f"{_OPTIMIZER}:Float16OptimizerWithFloat16Params.load_state_dict",
        replace=_put_empty_groups_back,
        why="a group of fp32 parameters has no fp32 copies to load",
    ),
)
_GROUPS = Patch(
    id="optimizer-checkpoint-groups",
    target=f"{_OPTIMIZER}:MegatronOptimizer._filter_and_reorder_param_groups",
    replace=_tell_decay_apart,
    why="tells mHC's group from that of norms and biases, as Megatron 0.19 does",
    versions=">=0.18.2,<0.19",
)


def numbers_all(sharded_state_dict: Callable[..., Any]) -> bool:
    """Whether this method of Megatron's tells fp32 copies from parameters that are fp32 themselves.

    Only one that looks at the copies can; the others take every parameter to have one.
    """
    return "fp32_from_float16_groups" in inspect.unwrap(sharded_state_dict).__code__.co_names


def optimizer_checkpoint_patches() -> tuple[Patch, ...]:
    """The patches that the installed Megatron needs."""
    is_mended = is_there(_SAVE) and numbers_all(getattr(*locate(_SAVE)))
    numbering = () if is_mended else _NUMBERING
    groups = (_GROUPS,) if is_installed(_GROUPS.versions) else ()
    return (*numbering, *_PATCHES, *groups)
