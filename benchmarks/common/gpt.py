"""The GPT that is measured in a script's own process, without Megatron's training loop."""

import os
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_mhc import MHCConfig, with_mhc

VOCABULARY = 1024


class Sizes(Protocol):
    """Of the model, as flags of the command line name them."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int


_COMMON: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "bf16": True,
    "params_dtype": torch.bfloat16,
    "gradient_accumulation_fusion": False,
}


def dense_config(sizes: Sizes, **settings: Any) -> TransformerConfig:
    """RMSNorm, grouped-query attention and SwiGLU in bf16, without bias and dropout.

    Args:
        settings: of TransformerConfig, beside or instead of these.
    """
    dense = {
        "num_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "ffn_hidden_size": sizes.ffn,
        "num_attention_heads": sizes.heads,
        "num_query_groups": sizes.groups,
    }
    return TransformerConfig(**_COMMON | dense | settings)


def paper_config(sizes: Sizes, **settings: Any) -> TransformerConfig:
    """The paper's layers in bf16: multi-latent attention, a dense layer, then experts.

    Of `sizes` the layers count alone. As `examples/moe/cluster.sh`, with 12 experts.

    Args:
        settings: of MLATransformerConfig, beside or instead of these.
    """
    experts = {
        "num_moe_experts": 12,
        "moe_layer_freq": [0] + [1] * (sizes.layers - 1),
        "moe_ffn_hidden_size": 1536,
        "moe_shared_expert_intermediate_size": 3072,
        "moe_router_topk": 6,
        "moe_router_score_function": "sigmoid",
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-4,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_token_dispatcher_type": "alltoall",
    }
    paper = {
        "num_layers": sizes.layers,
        "hidden_size": 2560,
        "ffn_hidden_size": 12288,
        "num_attention_heads": 32,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_head_dim": 128,
        "qk_pos_emb_head_dim": 64,
        "v_head_dim": 128,
        "qk_layernorm": True,
        "rope_type": "rope",
        "apply_rope_fusion": False,
        "multi_latent_attention": True,
        "init_method_std": 0.006,
    }
    return MLATransformerConfig(**_COMMON | paper | experts | settings)


def build(
    config: TransformerConfig, spec: Any, mhc: MHCConfig | None, sequence: int, **settings: Any
) -> torch.nn.Module:
    """The model on the GPU in bf16, the same weights every time.

    Args:
        spec: of an ordinary layer.
        mhc: None builds the ordinary model.
        sequence: tokens at most.
        settings: of GPTModel.
    """
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    model = GPTModel(
        config,
        spec if mhc is None else with_mhc(spec, mhc),
        vocab_size=VOCABULARY,
        max_sequence_length=sequence,
        position_embedding_type="rope",
        **settings,
    )
    return Float16Module(config, model.cuda())


def join(backend: str = "nccl") -> tuple[int, int]:
    """Make Megatron's process groups, every rank of torchrun's a pipeline stage; without it, one.

    Returns:
        This rank, and how many there are.
    """
    # port 0: the store takes a free one, which a group of one need not know
    for name, alone in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, alone)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=world)
    return rank, world
