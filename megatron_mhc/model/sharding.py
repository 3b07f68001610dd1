"""What Megatron's FSDP wrappers ask of a model before they wrap it."""

from typing import Any

from .layer import MHCLayer
from .parameters import is_hyper_connection

SHARDS_PARAMETERS = "optim_grads_params"
"""Megatron-FSDP's strategy in which a layer has its parameters only while it runs."""


def prepare_fsdp(module: Any, ddp_config: Any) -> None:
    """Let no layer read another one's parameters, where they are there only while it runs.

    Args:
        module: a model chunk; one without mHC stays as it is.
        ddp_config: Megatron's DistributedDataParallelConfig.

    Raises:
        ValueError: a setting of mHC that does not work with Megatron-FSDP.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, MHCLayer)]
    if any(layer.mhc.overlap_p2p for layer in layers):
        raise ValueError(
            "--mhc-overlap-p2p does not work with --use-megatron-fsdp, whose hooks do not know the"
            " streams beside the compute stream: drop one of the two"
        )
    if ddp_config.data_parallel_sharding_strategy != SHARDS_PARAMETERS:
        return
    for layer in layers:
        layer.fuses_with_next = False
        if layer.recompute_plan is not None and layer.recompute_plan.norms:
            raise ValueError(
                "--mhc-recompute runs the norms of a block again in the backward, and with"
                f" --data-parallel-sharding-strategy {SHARDS_PARAMETERS} their weights are not"
                " there then: use optim_grads, or drop --mhc-recompute"
            )


def refuse_torch_fsdp(module: Any) -> None:
    """Refuse a model with mHC in front of torch's FSDP2.

    Raises:
        ValueError: it has parameters of mHC.
    """
    if any(is_hyper_connection(parameter) for parameter in module.parameters()):
        raise ValueError(
            "mHC does not work with --use-torch-fsdp2, which wants one dtype in a layer, and mHC's"
            " parameters stay fp32: use --use-megatron-fsdp, or the distributed optimizer"
        )
