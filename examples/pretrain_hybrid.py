"""Trains a HybridModel with Megatron: data, loss and loop are `pretrain_gpt.py`'s.

The layers are `--hybrid-layer-pattern`'s, of `--spec`'s kinds; nothing in it knows of mHC:

    python -m megatron_mhc.run --cpu examples/pretrain_hybrid.py FLAGS --mhc
        --hybrid-layer-pattern '*-*-' --spec megatron.core.models.hybrid.hybrid_layer_specs
        hybrid_stack_spec
"""

import argparse
from collections.abc import Callable
from typing import Any

import pretrain_gpt
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args
from megatron.training.argument_utils import (
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import core_transformer_config_from_args


def build_hybrid(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> HybridModel:
    """Builds this pipeline stage's part of the model, for Megatron-Core 0.18."""
    args = get_args()
    return HybridModel(
        config=config or core_transformer_config_from_args(args),
        hybrid_stack_spec=import_module(args.spec),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        hybrid_layer_pattern=args.hybrid_layer_pattern,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def describe_model(args: argparse.Namespace) -> tuple[Any, Callable[..., HybridModel] | None]:
    """Megatron's settings of the run, and the function that builds the model if they do not."""
    if args.hybrid_layer_pattern is None:
        raise ValueError(
            "--hybrid-layer-pattern is missing: it says which layers the model has; add '*-*-', say"
        )
    if pretrain_gpt.gpt_config_from_args is None:
        return pretrain_cfg_container_from_args(args), build_hybrid
    return pretrain_cfg_container_from_args(args, hybrid_config_from_args(args)), None


if __name__ == "__main__":
    pretrain_gpt.main(describe=describe_model)
