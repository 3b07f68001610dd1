"""Trains a GPT by `--spec`, in a process that holds ordinary models too.

The environment's MODELS names them, in their order: "student" is the run's own model and gets what
`--spec` names, "dense student" does not, "part of a student" leaves its last layer ordinary;
"teacher" is ordinary, "critic" ordinary with an optimizer of its own.
"""

import copy
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.training import get_megatron_optimizer_config, get_model

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
import pretrain_gpt


def build(kind: str, **_: Any) -> GPTModel:
    """A model of this kind, with a TransformerConfig of its own."""
    args = get_args()
    config = core_transformer_config_from_args(args)
    spec = ordinary = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    if "student" in kind and args.spec and kind != "dense student":
        spec = import_module(args.spec)(config)
    if kind == "part of a student":
        layer, block = spec, copy.copy(ordinary)
        block.layer_specs = [layer] * (args.num_layers - 1) + [ordinary.layer_specs[-1]]
        spec = block
    sizes = (args.padded_vocab_size, args.max_position_embeddings)
    return GPTModel(config, spec, *sizes, position_embedding_type="rope")


def build_all(**_: Any) -> GPTModel:
    """Every model; the student's is what Megatron trains."""
    student = None
    for kind in os.environ["MODELS"].split(", "):
        if "student" in kind:
            student = build(kind)
            continue
        model = get_model(partial(build, kind), wrap_with_ddp=kind == "critic")
        if kind == "critic":
            get_megatron_optimizer(*get_megatron_optimizer_config(get_args())[:1], model)
        print(f"> built an ordinary model: {kind}", flush=True)
    assert student is not None
    return student


if __name__ == "__main__":
    pretrain(
        pretrain_cfg_container_from_args(parse_and_validate_args()),
        pretrain_gpt.datasets_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=pretrain_gpt.forward_step,
        model_provider=build_all,
    )
