"""Patches of the two FSDP wrappers: they tell somebody what they are about to wrap.

Whether FSDP is on stands on no TransformerConfig; what every way of turning it on ends in is the
wrapper.
"""

import functools
from collections.abc import Callable
from typing import Any

from .registry import Patch

_WRAPPERS = {
    "megatron-fsdp": "fsdp.mcore_fsdp_adapter:FullyShardedDataParallel",
    "torch-fsdp2": "torch_fully_sharded_data_parallel:TorchFullyShardedDataParallel",
}


def fsdp_patches(check: Callable[[Any], None]) -> tuple[Patch, ...]:
    """`check(module)` runs before one of Megatron's FSDP wrappers wraps a module."""

    def replace(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(self: Any, config: Any, ddp_config: Any, module: Any, *a: Any, **k: Any) -> None:
            check(module)
            original(self, config, ddp_config, module, *a, **k)

        return init

    return tuple(
        Patch(
            id=id_,
            target=f"megatron.core.distributed.{wrapper}.__init__",
            replace=replace,
            why="FSDP refuses a model with mHC",
        )
        for id_, wrapper in _WRAPPERS.items()
    )
