"""Patches of the schedule that hides all-to-alls behind another microbatch's layers.

`--overlap-moe-expert-parallel-comm` cuts a layer into nodes with a graph each. What crosses from
node to node is detached, one tensor at a time; a model's blocks are not called.
"""

import functools
from collections.abc import Callable
from typing import Any

from .registry import Patch
from .supported_versions import is_installed

_NODE = (
    "megatron.core.models.gpt.fine_grained_callables:TransformerLayerNode"
    if is_installed("<0.19")
    else "megatron.core.models.common.utils:TransformerLayerNode"
)


def _detach_each(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def detach(self: Any, value: Any) -> Any:
        if not isinstance(value, tuple):
            return original(self, value)
        parts = [detach(self, part) for part in value]
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)

    return detach


def schedule_plan_patches(prepare: Callable[[Any], None]) -> tuple[Patch, ...]:
    """`prepare(model)` runs before every schedule plan of a GPTModel is built."""

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def build_schedule_plan(self: Any, *args: Any, **kwargs: Any) -> Any:
            prepare(self)
            return original(self, *args, **kwargs)

        return build_schedule_plan

    return (
        Patch(
            id="schedule-plan",
            target="megatron.core.models.gpt.gpt_model:GPTModel.build_schedule_plan",
            replace=replace,
            why="the layers' places are looked at where no block's forward runs",
        ),
        Patch(
            id="schedule-node-detach",
            target=f"{_NODE}.detach",
            replace=_detach_each,
            why="a residual of several tensors crosses from node to node, with all its gradients",
        ),
    )
