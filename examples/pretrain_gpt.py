"""Trains a GPT with Megatron: Megatron's arguments, data, optimizer, checkpoints and logs.

A main script such as every Megatron user has one. Nothing in it knows of mHC; the runner turns
that on:

    torchrun --nproc-per-node 8 -m megatron_mhc.run examples/pretrain_gpt.py FLAGS --mhc
    python -m megatron_mhc.run --cpu examples/pretrain_gpt.py FLAGS --mhc

FLAGS are Megatron's own (`--help` lists them); the launch scripts in `gpt/` and `moe/` have sets.
Written for Megatron-Core 0.19; runs with 0.18 too.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.spec_utils import import_module
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, get_timers, pretrain, print_rank_0
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split

try:
    from megatron.training.argument_utils import gpt_config_from_args
except ImportError:  # Megatron-Core 0.18 takes a function that builds the model instead
    gpt_config_from_args = None

Batch = dict[str, torch.Tensor]


def datasets_provider(
    num_samples: list[int], vp_stage: int | None = None, seed: int | None = None
) -> tuple[GPTDataset | None, ...]:
    """Builds the training, validation and test datasets that `--data-path` names.

    Args:
        num_samples: how many samples each of the three must yield.
        vp_stage: the model chunk that asks; all read the same data.
        seed: of the order of the samples; None: `--seed`.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed if seed is None else seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    print_rank_0("> building the training, validation and test datasets")
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, lambda: True, config).build()


# Every rank reads its samples itself, from a memory-mapped file: nothing needs broadcasting.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def get_batch(data_iterator: Iterator[Batch]) -> Batch:
    """The next micro-batch on this rank's device, cut to this rank's part of the sequence."""
    batch = next(data_iterator)
    wanted = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
    batch = {key: batch[key].cuda(non_blocking=True) for key in wanted if key in batch}
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=get_context_parallel_group()
    )


def loss_func(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sums the losses of a micro-batch over its unmasked tokens.

    Returns:
        The sum, the number of tokens to divide it by, and what Megatron logs: both in one tensor.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=lambda value: not torch.isfinite(value),
            message="the loss of this micro-batch is not finite",
            tolerance=0.0,
            fatal=True,
        )
    num_tokens = mask.sum().to(torch.int)
    report = torch.cat([loss.detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(
    data_iterator: Iterator[Batch], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """Runs the model on one micro-batch; returns its output and the function that makes it a loss.

    On every pipeline stage but the last the output is a hidden state and the loss is not called.
    With --overlap-moe-expert-parallel-comm Megatron asks for the plan of what computes the output.
    """
    timer = get_timers()("batch-generator", log_level=2)
    timer.start()
    batch = get_batch(data_iterator)
    timer.stop()
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"])


def build_gpt(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    """Builds this pipeline stage's part of the model, for Megatron-Core 0.18."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    spec = import_module(args.spec) if args.spec else None
    return GPTModel(
        config=config,
        transformer_layer_spec=spec
        or get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=args.transformer_impl == "transformer_engine",
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=vp_stage,
        ),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def describe_model(args: argparse.Namespace) -> tuple[Any, Callable[..., GPTModel] | None]:
    """Megatron's settings of the run, and the function that builds the model if they do not."""
    if gpt_config_from_args is None:
        return pretrain_cfg_container_from_args(args), build_gpt
    return pretrain_cfg_container_from_args(args, gpt_config_from_args(args)), None


def main(
    provider: Callable[..., Any] = datasets_provider,
    describe: Callable[[argparse.Namespace], tuple[Any, Any]] = describe_model,
) -> None:
    """Reads Megatron's command line and trains on the datasets that `provider` builds.

    `describe` makes Megatron's settings of the arguments, as `describe_model` does.
    """
    config, model_provider = describe(parse_and_validate_args())
    pretrain(
        config,
        provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        model_provider=model_provider,
    )


if __name__ == "__main__":
    main()
