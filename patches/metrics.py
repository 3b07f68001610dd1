"""A patch of megatron.training: a look into a training step's forward and backward."""

import functools
from collections.abc import Callable
from typing import Any

from .registry import Patch

PATCH_ID = "metrics"


def metrics_patch(observe: Callable[[Callable[..., Any], list[Any], Any, int], Any]) -> Patch:
    """`observe(forward_backward, model, optimizer, step)` returns what runs as forward_backward.

    It is called in front of every training step, with the step as Megatron logs it (from 1); a
    script of one's own that calls `train_step` without an iteration is not observed.
    """

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def train_step(
            forward_step_func: Any,
            data_iterator: Any,
            model: list[Any],
            optimizer: Any,
            opt_param_scheduler: Any,
            config: Any,
            forward_backward_func: Callable[..., Any],
            iteration: int | None = None,
            *rest: Any,
            **named: Any,
        ) -> Any:
            if iteration is not None:
                forward_backward_func = observe(
                    forward_backward_func, model, optimizer, iteration + 1
                )
            before = (forward_step_func, data_iterator, model, optimizer, opt_param_scheduler)
            return original(*before, config, forward_backward_func, iteration, *rest, **named)

        return train_step

    return Patch(
        id=PATCH_ID,
        target="megatron.training.training:train_step",
        replace=replace,
        why="records mHC's metrics at the steps of --mhc-log-interval",
    )
