"""The GPT that is measured in a script's own process, without Megatron's training loop."""

import os
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
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
    return TransformerConfig(**dense | settings)


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
