"""Patches of Megatron's FSDP wrappers: two of its own and torch's.

Whether FSDP is on stands on no TransformerConfig; what every way of turning it on ends in is the
wrapper.
"""

import functools
from collections.abc import Callable
from typing import Any

from .registry import Patch, is_there

_MEGATRONS = "megatron.core.distributed.fsdp.mcore_fsdp_adapter:FullyShardedDataParallel"
"""The wrapper's class; from 0.20 on a function, which takes one of two classes by the version."""


def _first(
    look: Callable[[Any, Any], None],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`look(module, ddp_config)` in front of a wrapper's `__init__`."""

    def replace(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(self: Any, config: Any, ddp_config: Any, module: Any, *a: Any, **k: Any) -> None:
            look(module, ddp_config)
            original(self, config, ddp_config, module, *a, **k)

        return init

    return replace


def fsdp_patches(
    prepare: Callable[[Any, Any], None], refuse: Callable[[Any], None], mark: str
) -> tuple[Patch, ...]:
    """What runs before a model is wrapped, and what its optimizer sees afterwards.

    Args:
        prepare: called with the module and Megatron's DistributedDataParallelConfig in front of
            Megatron-FSDP.
        refuse: called with the module in front of torch's FSDP2.
        mark: an attribute of parameters that those which take their place get too.
    """

    def megatron(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(self: Any, config: Any, ddp_config: Any, module: Any, *a: Any, **k: Any) -> None:
            prepare(module, ddp_config)
            original(self, config, ddp_config, module, *a, **k)
            # Megatron hands on a list of attributes by name
            for _, parameter in self.param_and_grad_buffer.optimizer_named_parameters:
                if getattr(parameter.orig_param, mark, False):
                    setattr(parameter, mark, True)

        return init

    first = f"{_MEGATRONS}V1" if is_there(f"{_MEGATRONS}V1") else _MEGATRONS
    second = Patch(
        id="megatron-fsdp-2",
        target=f"{_MEGATRONS}V2.__init__",
        replace=_first(prepare),
        why="the second version of Megatron-FSDP refuses a model with mHC",
    )
    return (
        Patch(
            id="megatron-fsdp",
            target=f"{first}.__init__",
            replace=megatron,
            why="mHC's parameters keep their marks, and no layer reads another's shards",
        ),
        *((second,) if is_there(second.target) else ()),
        Patch(
            id="torch-fsdp2",
            target="megatron.core.distributed.torch_fully_sharded_data_parallel:"
            "TorchFullyShardedDataParallel.__init__",
            replace=_first(lambda module, _: refuse(module)),
            why="torch's FSDP2 refuses a model with mHC",
        ),
    )
