"""What Megatron's FSDP wrappers ask of a model before they wrap it."""

from typing import Any

import torch

from .layer import MHCLayer
from .parameters import is_hyper_connection

SHARDS_PARAMETERS = "optim_grads_params"
"""Megatron-FSDP's strategy in which a layer has its parameters only while it runs."""

SHARDS_NOTHING = "no_shard"
"""The one in which no layer's gradients are taken away when its backward ends (0.20)."""


def prepare_fsdp(module: Any, ddp_config: Any) -> None:
    """Let no layer read another one's parameters, where shards of them come and go with a layer;
    and all gradients of a layer be scaled alike.

    A connection that the layer before runs would get its gradient after Megatron has reduced it,
    and be run, where parameters are sharded too, before they are there.

    Megatron-FSDP reduces a layer's gradients as one batch, which torch runs with the operation of
    its first: a sum for those in bf16, which Megatron has divided by the ranks before, and for
    mHC's, in fp32, one that NCCL shall divide (`gradient_reduce_div_fusion`). So either mHC's
    gradients would be as many times too large, or the others too small. Now all are divided before.

    Args:
        module: a model chunk; one without mHC stays as it is.
        ddp_config: Megatron's DistributedDataParallelConfig.

    Raises:
        ValueError: a setting of mHC that does not work with Megatron-FSDP.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, MHCLayer)]
    version = getattr(ddp_config, "megatron_fsdp_version", 1)
    if layers and version != 1:
        raise ValueError(
            f"mHC is not tried with --megatron-fsdp-version {version} yet, which shards parameters"
            " in another way: use 1"
        )
    if any(layer.mhc.overlap_p2p for layer in layers):
        raise ValueError(
            "--mhc-overlap-p2p does not work with --use-megatron-fsdp, whose hooks do not know the"
            " streams beside the compute stream: drop one of the two"
        )
    if layers and any(p.dtype == torch.bfloat16 for p in module.parameters()):
        ddp_config.gradient_reduce_div_fusion = False
    strategy = ddp_config.data_parallel_sharding_strategy
    for layer in layers:
        layer.fuses_with_next &= strategy == SHARDS_NOTHING
        if layer.mhc.delayed and layer.recompute_plan is not None and not layer.fuses_with_next:
            raise ValueError(
                "--mhc-recompute does not work with delayed sites (convention deepseek_v4_1) and"
                f" --data-parallel-sharding-strategy {strategy}, under which no layer reads for the"
                f" next: use {SHARDS_NOTHING}, or drop --mhc-recompute"
            )
        norms = layer.recompute_plan.norms if layer.recompute_plan is not None else 0
        if norms and strategy == SHARDS_PARAMETERS:
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
