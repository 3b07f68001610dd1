"""`doctor --args FLAGS`: a training run without the training, for a cluster that is not here.

Megatron's own parser checks the flags. Every pipeline stage is then built at its real size with
tensors that have no memory, in a process group that only pretends, so parameters are counted and
not estimated (`stage_model`).
"""

import argparse
import contextlib
import dataclasses
import io
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_mhc.config import MHCConfig
from megatron_mhc.costs.formulas import (
    activation_bytes_a_token,
    forward_flops_a_token,
    full_recompute_bytes_a_token,
    parameters_of,
    training_flops_a_token,
)
from megatron_mhc.costs.recompute_plan import most_in_flight, plan_of
from megatron_mhc.costs.sites import Sites, distinct_mtp_layers, hybrid_pattern
from megatron_mhc.kernels import TRITON_STREAMS
from megatron_mhc.model.parameters import is_hyper_connection
from megatron_mhc.patches.supported_versions import is_installed, megatron_core_version
from megatron_mhc.start.flags import config_from_arguments

from . import step_page
from .progress import progress
from .stage_model import build, pretended, whole_sizes

GIB = 2**30


class FlagsError(ValueError):
    """Megatron or mHC refuses the flags."""


def _reason(error: Exception) -> str:
    """What an error says; where Megatron asserts without a word, the line that does."""
    if str(error):
        return str(error)
    line = traceback.extract_tb(error.__traceback__)[-1]
    if found := re.fullmatch(r"assert args\.(\w+) is not None", line.line or ""):
        flag = found[1].removeprefix("encoder_").replace("_", "-")  # which --seq-length sets
        return f"--{flag} is missing: add it"
    return f"{type(error).__name__} at `{line.line}` ({line.filename}:{line.lineno})"


def parse(flags: Sequence[str]) -> argparse.Namespace:
    """The flags as a training run would have them, validated.

    Raises:
        FlagsError: says what Megatron or mHC says of them.
    """
    from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    before, sys.argv = sys.argv, ["doctor --args", *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints all of its arguments
            args = parse_args()
            validate_args(args)
        reconfigure_num_microbatches_calculator(
            rank=1,  # rank 0 talks
            global_batch_size=args.global_batch_size,
            micro_batch_size=args.micro_batch_size,
            data_parallel_size=args.data_parallel_size,
            decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
        )
    except (ValueError, AssertionError, RuntimeError) as error:
        raise FlagsError(f"these flags are refused: {_reason(error)}") from error
    finally:
        sys.argv = before
    if args.padded_vocab_size is None:  # in a training run the tokenizer sets it
        if args.vocab_size is None:
            raise FlagsError("--vocab-size is missing, and no tokenizer is read here: add it")
        args.padded_vocab_size = calculate_padded_vocab_size(
            args.vocab_size,
            args.make_vocab_size_divisible_by,
            args.tensor_model_parallel_size,
            logging_enabled=False,
        )
    return args


def bytes_of_states(args: argparse.Namespace, chunks: list[torch.nn.Module]) -> float:
    """Weights, gradients and optimizer states of this rank.

    A parameter, its gradient (fp32 beside bf16 weights) and Adam's two fp32 averages, with an fp32
    copy of what is not fp32; the distributed optimizer shards averages and copies.
    """
    from megatron.core import parallel_state

    dense = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    expert = parallel_state.get_expert_data_parallel_world_size()
    total = 0.0
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        own = parameter.element_size()
        gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else own
        shards = dense if getattr(parameter, "allreduce", True) else expert
        states = 8.0 if own >= 4 else 12.0
        states /= shards if args.use_distributed_optimizer else 1
        total += parameter.numel() * (own + gradient + states)
    return total


def _own_norms(args: argparse.Namespace, layers: Sequence[Any]) -> float:
    """Norms of a layer that are modules of their own with Transformer Engine, on average.

    It fuses the others into the projections behind them.
    """
    own = 0
    for layer in layers:
        own += args.multi_latent_attention and hasattr(layer, "attention_site")
        own += hasattr(layer, "mlp_site") and layer.is_moe_layer
    return own / len(layers)


def bytes_of_streams(
    args: argparse.Namespace, mhc: MHCConfig, chunks: list[torch.nn.Module], stage: int
) -> tuple[float, str]:
    """What mHC adds to this rank's activations, in bytes a token, and how that was reckoned."""
    plan = plan_of(chunks)
    if plan is not None:
        if args.transformer_impl == "transformer_engine":
            layers = [layer for chunk in chunks for layer in _layers(chunk)]
            layers = [layer for layer in layers if not layer.is_mtp]
            if hybrid_pattern(args) is None:
                layers = layers[:1]  # whose plan it is
            plan = dataclasses.replace(plan, norms=_own_norms(args, layers))
        return sum(plan.bytes_a_token.values()), plan.in_words
    in_flight = most_in_flight(chunks[0].config, mhc, stage)
    sizes = (args.hidden_size, args.params_dtype.itemsize)
    kept, rebuilt = 0, 0
    for chunk in chunks:
        whole = _layers(chunk)
        if args.recompute_granularity == "full":
            decoder = sum(not layer.is_mtp for layer in whole)
            inputs, block = full_recompute_bytes_a_token(
                mhc,
                decoder,
                *sizes,
                args.recompute_method,
                args.recompute_num_layers,
                len(whole[0].sites),
            )
            kept, rebuilt = kept + inputs, max(rebuilt, block)
            # multi-token prediction starts from one stream, and "block" does not recompute it
            whole = [m for m in whole if m.is_mtp and args.recompute_method == "block"]
        kept += activation_bytes_a_token(mhc, sum(map(sites_passed(args), whole)), *sizes)
    unit = "microbatch" if in_flight == 1 else "microbatches"
    return kept * in_flight / len(chunks) + rebuilt, f"{in_flight} {unit} in flight"


def sites_passed(args: argparse.Namespace) -> Callable[[Any], int]:
    """How many sites a token passes in a layer: one of multi-token prediction may run at several
    depths."""
    depths = (args.mtp_num_layers or 0) // max(distinct_mtp_layers(args), 1)
    return lambda layer: len(layer.sites) * (depths if layer.is_mtp else 1)


def _layers(chunk: torch.nn.Module) -> list[Any]:
    from megatron_mhc.model.layer import MHCLayer

    return [module for module in chunk.modules() if isinstance(module, MHCLayer)]


def _is_served(mhc: MHCConfig) -> bool:
    """Whether the Triton kernels serve it, whose bytes and times these are."""
    return mhc.variant == "mhc" and mhc.backend != "torch" and mhc.num_streams in TRITON_STREAMS


def costs(args: argparse.Namespace, mhc: MHCConfig) -> list[str]:
    """The lines about mHC itself."""
    from megatron.training.training import num_floating_point_operations

    sites = Sites.of(args)
    parameters = parameters_of(mhc, sites, args.hidden_size)
    forward = forward_flops_a_token(mhc, sites, args.hidden_size)
    extra = training_flops_a_token(args, mhc)
    # the figure that --log-throughput divides by the time: with the patch it has mHC's in it
    whole = num_floating_point_operations(args, 1) / args.seq_length
    lines = (
        []
        if _is_served(mhc)
        else ["  activations: of the Triton kernels of variant mhc; what runs here keeps more"]
    )
    return [
        f"mHC: {sites.built} sites, {parameters:,} extra parameters (fp32)",
        f"  FLOPs a token: {forward:,} forward, {extra:,} a training step,"
        f" {extra / (whole - extra):.2%} of the ordinary model's {whole - extra:,.0f}",
        *lines,
    ]


def _states(args: argparse.Namespace, chunks: list[torch.nn.Module]) -> str:
    """How many parameters a rank has, and the bytes of what stays."""
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    ours = sum(p.numel() for p in parameters if is_hyper_connection(p))
    size = bytes_of_states(args, chunks) / GIB
    return (
        f"{sum(p.numel() for p in parameters):,} parameters ({ours:,} of mHC), {size:.1f} GiB of"
        " weights, gradients and optimizer"
    )


def _time(
    args: argparse.Namespace,
    mhc: MHCConfig,
    sublayers: list[list[int]],
    tokens: int,
    given: step_page.Assumptions,
) -> list[str]:
    """The lines about a step's time, where it is known."""
    if mhc.delayed:
        return ["a step's time is not reckoned for delayed sites: their kernels are not timed"]
    if not _is_served(mhc):
        return []
    try:
        return step_page.lines(step_page.run_of(args, mhc, sublayers, tokens), given)
    except ValueError as error:
        raise FlagsError(str(error)) from error


def _stage(
    args: argparse.Namespace, mhc: MHCConfig | None, stage: int, tokens: int, whole: dict[str, int]
) -> tuple[str, list[int]]:
    """Build a stage; its line, and the sites that a token passes in each of its chunks.

    Adds the sizes of its parameters to `whole`.
    """
    with pretended(args, stage) as groups:
        try:
            chunks = build(args, groups)
            whole |= whole_sizes(args, chunks)
        except (ValueError, AssertionError, RuntimeError, ImportError) as error:
            raise FlagsError(f"stage {stage} cannot be built: {_reason(error)}") from error
        row = f"stage {stage}, a GPU: {_states(args, chunks)}"
        if mhc is not None:
            bytes_a_token, how = bytes_of_streams(args, mhc, chunks, stage)
            row += f"; mHC's activations {bytes_a_token:,.0f} bytes a token,"
            row += f" {bytes_a_token * tokens / GIB:.1f} GiB ({how})"
        return row, [sum(map(sites_passed(args), _layers(chunk))) for chunk in chunks]


def page(flags: Sequence[str], given: step_page.Assumptions | None = None) -> str:
    """The page that `doctor --args` prints.

    Args:
        flags: of a training script.
        given: what a step's time is reckoned with.

    Raises:
        FlagsError: the flags are refused, or Megatron-Core is 0.18.
    """
    if is_installed("<0.19"):
        raise FlagsError(
            "--args builds the model as Megatron-Core 0.19 does, and this is"
            f" {megatron_core_version()}: install 0.19"
        )
    from megatron.training.global_vars import set_args
    from megatron.training.theoretical_memory_usage import compute_activation_memory

    args = parse(flags)
    set_args(args)
    mhc = config_from_arguments(args) if args.mhc else None
    sizes = (
        f"tensor {args.tensor_model_parallel_size}, pipeline {args.pipeline_model_parallel_size}"
    )
    sizes += f", expert {args.expert_model_parallel_size}, context {args.context_parallel_size}"
    unit = "GPU" if args.world_size == 1 else "GPUs"
    lines = [f"{args.world_size} {unit}: {sizes}, data {args.data_parallel_size}; flags accepted"]
    lines += costs(args, mhc) if mhc is not None else ["mHC is off"]
    tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
    if args.sequence_parallel:
        tokens //= args.tensor_model_parallel_size
    whole: dict[str, int] = {}
    sublayers = []
    stages = range(args.pipeline_model_parallel_size)
    with progress("doctor: building", len(stages), "stages") as bar:
        for stage in stages:
            row, passed = _stage(args, mhc, stage, tokens, whole)
            lines.append(row)
            sublayers.append(passed)
            bar.update()
    lines.append(f"the whole model: {sum(whole.values()):,} parameters")
    with contextlib.redirect_stdout(io.StringIO()):
        ordinary = compute_activation_memory(args, num_microbatches=None)
    lines.append(
        f"the ordinary model's activations on stage 0: {ordinary / GIB:.1f} GiB by Megatron's"
        " formula (dense layers of this ffn width, nothing recomputed)"
    )
    if mhc is not None:
        lines += _time(args, mhc, sublayers, tokens, given or step_page.Assumptions())
    return "\n".join(lines)
