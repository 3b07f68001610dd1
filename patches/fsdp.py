"""Patches of Megatron's two FSDP wrappers.

Whether FSDP is on stands on no TransformerConfig; what every way of turning it on ends in is the
wrapper.
"""

import functools
from collections.abc import Callable
from typing import Any

from .registry import Patch


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

    def torch(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(self: Any, config: Any, ddp_config: Any, module: Any, *a: Any, **k: Any) -> None:
            refuse(module)
            original(self, config, ddp_config, module, *a, **k)

        return init

    distributed = "megatron.core.distributed"
    return (
        Patch(
            id="megatron-fsdp",
            target=f"{distributed}.fsdp.mcore_fsdp_adapter:FullyShardedDataParallel.__init__",
            replace=megatron,
            why="mHC's parameters keep their marks, and no layer reads another's shards",
        ),
        Patch(
            id="torch-fsdp2",
            target=f"{distributed}.torch_fully_sharded_data_parallel:"
            "TorchFullyShardedDataParallel.__init__",
            replace=torch,
            why="torch's FSDP2 refuses a model with mHC",
        ),
    )
