"""Patches that choose another schedule for a model that overlaps its pipeline communication."""

import functools
from collections.abc import Callable
from typing import Any

from .registry import Patch

_SCHEDULES = "megatron.core.pipeline_parallel.schedules"


def pipeline_schedule_patches(
    run: Callable[[str, Callable[..., Any], dict[str, Any]], Any],
) -> tuple[Patch, ...]:
    """`run(name, original, arguments)` runs the schedule of that name, Megatron's or another."""

    def patch(id_: str, name: str) -> Patch:
        def replace(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def schedule(**arguments: Any) -> Any:
                return run(name, original, arguments)

            return schedule

        return Patch(
            id=id_,
            target=f"{_SCHEDULES}:{name}",
            replace=replace,
            why="runs --mhc-overlap-p2p; every other model as before",
        )

    return (
        patch("pipeline-schedule", "forward_backward_pipelining_without_interleaving"),
        patch("pipeline-schedule-interleaved", "forward_backward_pipelining_with_interleaving"),
    )
