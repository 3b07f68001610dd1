"""Megatron's own Python in the place of fused CUDA kernels, where both are installed."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_mhc.patches.registry import Patch, locate


def _instead(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


def _megatrons(name: str) -> Callable[[Any], Any]:
    def find(original: Any) -> Any:
        owner, attribute = locate(f"megatron.core.{name}")
        return getattr(owner, attribute)

    return find


def _without_kernels(why: str, **values: tuple[str, Callable[[Any], Any]]) -> tuple[Patch, ...]:
    return tuple(
        Patch(f"cpu-{name.replace('_', '-')}", f"megatron.core.{target}", replace, why)
        for name, (target, replace) in values.items()
    )


WITHOUT_KERNELS: tuple[Patch, ...] = (
    *_without_kernels(
        "torch's optimizers, where Transformer Engine or Apex is installed too",
        adam=("optimizer:Adam", _instead(torch.optim.AdamW)),
        sgd=("optimizer:SGD", _instead(torch.optim.SGD)),
        torch_optimizers=("optimizer:USING_PYTORCH_OPTIMIZER", _instead(True)),
        distributed_adam=("optimizer.distrib_optimizer:Adam", _instead(torch.optim.Adam)),
        no_fused_adam=("optimizer.distrib_optimizer:HAVE_APEX_OR_TE", _instead(False)),
        no_te_adam=("optimizer.distrib_optimizer:USING_TE_OPTIMIZER", _instead(False)),
        no_apex_adam=("optimizer.distrib_optimizer:USING_APEX_OPTIMIZER", _instead(False)),
    ),
    *_without_kernels(
        "Megatron's own loops over tensors, where fused ones are installed too",
        clip_apply=(
            "optimizer.clip_grads:multi_tensor_applier",
            _megatrons("utils:local_multi_tensor_applier"),
        ),
        clip_norm=(
            "optimizer.clip_grads:l2_norm_impl",
            _megatrons("utils:local_multi_tensor_l2_norm"),
        ),
        clip_scale=(
            "optimizer.clip_grads:multi_tensor_scale_impl",
            _megatrons("utils:local_multi_tensor_scale"),
        ),
        clip_scale_tensor=("optimizer.clip_grads:multi_tensor_scale_tensor_impl", _instead(None)),
        copy_apply=(
            "optimizer.optimizer:multi_tensor_applier",
            _megatrons("utils:local_multi_tensor_applier"),
        ),
        copy_scale=(
            "optimizer.optimizer:multi_tensor_scale_impl",
            _megatrons("utils:local_multi_tensor_scale"),
        ),
    ),
    *_without_kernels(
        "torch's norm in the local specs, where Transformer Engine or Apex is installed too",
        local_norm=(
            "models.backends:LNImpl",
            _megatrons("transformer.torch_norm:WrappedTorchNorm"),
        ),
        final_norm=(
            "transformer.transformer_block:LayerNormImpl",
            _megatrons("transformer.torch_norm:WrappedTorchNorm"),
        ),
    ),
    *_without_kernels(
        "a fusion asked for that has no CPU code stops Megatron with its own message",
        no_gradient_accumulation_fusion=(
            "tensor_parallel.layers:_grad_accum_fusion_available",
            _instead(False),
        ),
        no_rope_fusion=(
            "models.common.embeddings.rope_utils:fused_apply_rotary_pos_emb",
            _instead(None),
        ),
        no_packed_rope_fusion=(
            "models.common.embeddings.rope_utils:fused_apply_rotary_pos_emb_thd",
            _instead(None),
        ),
        no_mla_rope_fusion=(
            "transformer.multi_latent_attention:fused_apply_mla_rope_for_q",
            _instead(None),
        ),
    ),
)
