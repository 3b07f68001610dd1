"""A pipeline stage of a model at its real size, on tensors without memory, with no other process.

Nothing needs a GPU or Transformer Engine: the layers are those of the local implementation, which
have the same shapes (what they lack, `add_fused_norms` adds).
"""

import argparse
import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from megatron_mhc.costs.sites import hybrid_pattern
from megatron_mhc.patches import registry
from megatron_mhc.patches.cpu.hybrid import HYBRID

WITHOUT_TRANSFORMER_ENGINE = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_padding_for_quantization": False,
    "fp8": None,
    "context_parallel_size": 1,
    "gradient_accumulation_fusion": False,
    "layernorm_zero_centered_gamma": False,
}
"""What is built instead of what was asked for: nothing here changes the shape of a parameter."""


@contextlib.contextmanager
def pretended(args: argparse.Namespace, stage: int) -> Iterator[Any]:
    """The process groups of a rank of this pipeline stage, without any other process."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.testing._internal.distributed.fake_pg import FakeStore

    stages = args.pipeline_model_parallel_size
    rank = stage * (args.world_size // stages)
    dist.init_process_group("fake", rank=rank, world_size=args.world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def check_fusions(args: argparse.Namespace) -> None:
    """Let Megatron judge RoPE's fusion as asked for, which nothing that is built here has.

    Raises:
        ValueError: Megatron's, unless all it misses is Transformer Engine.
    """
    others = WITHOUT_TRANSFORMER_ENGINE | {"apply_rope_fusion": args.apply_rope_fusion}
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            model_config(argparse.Namespace(**(vars(args) | others)))
    except ValueError as error:
        if "install TE" not in str(error):
            raise


def model_config(args: argparse.Namespace) -> Any:
    """Megatron's configuration of the model that the arguments describe."""
    from megatron.core.models.hybrid import hybrid_layer_specs
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

    if hybrid_pattern(args) is None:
        return gpt_config_from_args(args)
    config = hybrid_config_from_args(args)
    if config.hybrid_stack_spec is None:
        config.hybrid_stack_spec = hybrid_layer_specs.hybrid_stack_spec
    return config


def build(args: argparse.Namespace, groups: Any) -> list[torch.nn.Module]:
    """The model chunks of this rank, on tensors without memory."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training.models.gpt import GPTModelBuilder
    from megatron.training.models.hybrid import HybridModelBuilder
    from torch._subclasses.fake_tensor import FakeTensorMode

    local = argparse.Namespace(**(vars(args) | WITHOUT_TRANSFORMER_ENGINE))
    lacks_norms = args.qk_layernorm and args.multi_latent_attention and args.q_lora_rank is None
    local.qk_layernorm = args.qk_layernorm and not lacks_norms
    chunks = args.virtual_pipeline_model_parallel_size
    with local_hybrid_stack():
        check_fusions(args)
        model_parallel_cuda_manual_seed(1)
        with contextlib.redirect_stdout(io.StringIO()):
            config = model_config(local)
        config.transformer.perform_initialization = False
        is_hybrid = hybrid_pattern(args) is not None
        builder = HybridModelBuilder(config) if is_hybrid else GPTModelBuilder(config)
        with FakeTensorMode(allow_non_fake_inputs=True):
            built = [
                builder.build_model(groups, vp_stage=chunk if chunks else None)
                for chunk in range(chunks or 1)
            ]
            if lacks_norms:
                add_fused_norms(built)
    return built


@contextlib.contextmanager
def local_hybrid_stack() -> Iterator[None]:
    """Megatron has no local spec of a HybridModel: inside, that of `--cpu` is there."""
    # it logs the layers of every stage
    logging.getLogger("megatron.core.models.hybrid").setLevel(logging.WARNING)
    mine = [s.patch for s in registry.status(*HYBRID) if s.state != "applied"]
    registry.apply(*mine)
    try:
        yield
    finally:
        if mine:  # of none, all would be undone
            registry.undo(*(patch.id for patch in mine))


def add_fused_norms(chunks: list[torch.nn.Module]) -> None:
    """The norms of `--qk-layernorm` with latent attention and without `--q-lora-rank`.

    Transformer Engine fuses one, over the hidden size, into the queries' projection and one into
    that of the keys' and values' latent. The local implementation has neither, and is built without
    the flag.
    """
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    for attention in (m for chunk in chunks for m in chunk.modules()):
        if isinstance(attention, MLASelfAttention):
            config = attention.config
            attention.q_layernorm = WrappedTorchNorm(config, config.hidden_size)
            attention.kv_layernorm = WrappedTorchNorm(config, config.kv_lora_rank)


def whole_sizes(args: argparse.Namespace, chunks: list[torch.nn.Module]) -> dict[str, int]:
    """The whole model's size of every parameter of this rank, by its key in a checkpoint.

    Raises:
        ValueError: Megatron could train this rank's part, with mHC or without, and not save it.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    sizes = {}
    for chunk in chunks:
        try:
            state = chunk.sharded_state_dict(  # type: ignore[operator]
                metadata={"non_homogeneous_layers": True}
            )
        except AssertionError as error:
            if args.mtp_num_layers and not args.untie_embeddings_and_output_weights:
                raise ValueError(
                    "Megatron could train it and not save it: multi-token prediction on a stage"
                    " behind the first wants --untie-embeddings-and-output-weights"
                ) from error
            raise
        apply_factories(state)
        buffers = {id(buffer) for buffer in chunk.buffers()}
        for leaf in nested_values(state):
            if isinstance(leaf, ShardedTensor) and id(leaf.data) not in buffers:
                sizes[leaf.key] = math.prod(leaf.global_shape)
    return sizes
