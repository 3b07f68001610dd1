"""The model of `layers.py` and `memory.py`: on one GPU, with Transformer Engine's layers."""

import argparse
from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs as specs

from benchmarks.common import gpt
from megatron_mhc import MHCConfig


def build(options: argparse.Namespace, mhc: MHCConfig | None, **settings: Any) -> torch.nn.Module:
    """The model of these options.

    Args:
        mhc: None builds the ordinary model.
        settings: of TransformerConfig, beyond the options'.
    """
    if getattr(options, "moe", False):
        config = gpt.paper_config(options, **settings)
        spec = specs.get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    else:
        config = gpt.dense_config(options, **settings)
        own = {"enable_hyper_connection": True} if settings.get("enable_hyper_connections") else {}
        spec = specs.get_gpt_layer_with_transformer_engine_spec(**own)
    return gpt.build(config, spec, mhc, options.sequence)


def random_tokens(options: argparse.Namespace) -> torch.Tensor:
    """A microbatch [b, sequence + 1]."""
    shape = (options.batch, options.sequence + 1)
    return torch.randint(0, gpt.VOCABULARY, shape, device="cuda")


def loss_of(model: torch.nn.Module, options: argparse.Namespace, tokens: torch.Tensor) -> Any:
    """Mean loss of [b, sequence + 1] tokens."""
    positions = torch.arange(options.sequence, device="cuda").expand(len(tokens), -1)
    return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).float().mean()
