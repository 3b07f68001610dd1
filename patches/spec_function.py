"""A patch for Megatron-Core 0.18, which does not call a layer spec that is a function.

There `--spec MODULE NAME` hands GPTModel what that name stands for, as it is. 0.19 calls a function
with the model's configuration, which is the only way to a spec that depends on it.
"""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from .registry import Patch
from .supported_versions import is_installed


def spec_function_patches() -> tuple[Patch, ...]:
    """The patch where the installed Megatron needs it, else none."""

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _get_block_submodules(
            config: Any, spec: Any, vp_stage: int | None = None, pp_rank: int | None = None
        ) -> Any:
            if isinstance(spec, FunctionType):
                spec = spec(config, vp_stage=vp_stage)
            return original(config, spec, vp_stage, pp_rank)

        return _get_block_submodules

    patch = Patch(
        id="spec-function",
        target="megatron.core.transformer.transformer_block:_get_block_submodules",
        replace=replace,
        why="calls a layer spec that is a function, as Megatron 0.19 does",
        versions=">=0.18.2,<0.19",
    )
    return (patch,) if is_installed(patch.versions) else ()
