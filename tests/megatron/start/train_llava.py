"""Trains a tiny LLaVAModel with Megatron: a decoder by `--spec`, and a vision tower of its own."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
import pretrain_gpt

IMAGE_SIZE, PATCH = 8, 4


def build(pre_process: bool = True, post_process: bool = True, **_: Any) -> LLaVAModel:
    """The model; Megatron's multimodal example builds its own like this."""
    args = get_args()
    language = core_transformer_config_from_args(args)
    vision = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2)
    vision.vision_model_type = "internvit"  # the one without norms at its ends
    projection = TransformerConfig(
        num_layers=1, hidden_size=args.hidden_size, ffn_hidden_size=32, num_attention_heads=1
    )
    return LLaVAModel(
        language,
        import_module(args.spec)(language)
        if args.spec
        else decoder_model_with_local_default_spec(),
        args.padded_vocab_size,
        2 * args.seq_length,
        vision,
        get_vit_layer_with_local_spec(),
        True,
        projection,
        MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        language_position_embedding_type="rope",
        pre_process=pre_process,
        post_process=post_process,
        img_h=IMAGE_SIZE,
        img_w=IMAGE_SIZE,
        patch_dim=PATCH,
    )


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[Any, Any]:
    """One micro-batch, each of whose samples begins with an image."""
    batch = pretrain_gpt.get_batch(data_iterator)
    tokens = batch["tokens"].clone()
    tokens[:, 0] = DEFAULT_IMAGE_TOKEN_INDEX
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(tokens), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    losses, mask = model(
        images,
        tokens,
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses, partial(pretrain_gpt.loss_func, mask)


if __name__ == "__main__":
    pretrain(
        pretrain_cfg_container_from_args(parse_and_validate_args()),
        pretrain_gpt.datasets_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        model_provider=build,
    )
