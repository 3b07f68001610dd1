"""`doctor --args FLAGS`: a training run without the training, for a cluster that is not here.

Megatron's own parser checks the flags. Every pipeline stage is then built at its real size with
tensors that have no memory, in a process group that only pretends, so parameters are counted and
not estimated (`stage_model`).
"""

import argparse
import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence

import torch

from megatron_mhc.config import MHCConfig
from megatron_mhc.costs.formulas import (
    forward_flops_a_token,
    parameters_of,
    training_flops_a_token,
)
from megatron_mhc.costs.sites import Sites
from megatron_mhc.kernels import TRITON_STREAMS
from megatron_mhc.model.parameters import is_hyper_connection
from megatron_mhc.patches.supported_versions import is_installed, megatron_core_version
from megatron_mhc.start.environment import config_from_environment
from megatron_mhc.start.flags import HYBRID_SPEC, SPEC, config_from_arguments, flags_of
from megatron_mhc.start.refusals import FlagsError
from megatron_mhc.start.settings import VARIABLES
from megatron_mhc.start.suggestions import near

from . import step_page
from .progress import progress
from .stage_bytes import bytes_of_states, bytes_of_streams, layers_of, sites_passed
from .stage_model import build, pretended, whole_sizes

GIB = 2**30


def _reason(error: Exception) -> str:
    """What an error says; where Megatron asserts without a word, the line that does."""
    if str(error):
        return str(error)
    line = traceback.extract_tb(error.__traceback__)[-1]
    if found := re.fullmatch(r"assert args\.(\w+) is not None", line.line or ""):
        flag = found[1].removeprefix("encoder_").replace("_", "-")  # which --seq-length sets
        return f"--{flag} is missing: add it"
    return f"{type(error).__name__} at `{line.line}` ({line.filename}:{line.lineno})"


def _meant(refusal: str) -> str:
    """What was likely meant by words that Megatron's parser does not know."""
    _, unknown, words = refusal.partition("unrecognized arguments: ")
    hints = []
    for word in words.split() if unknown else []:
        if word.partition("=")[0] in step_page.FLAGS:
            hints.append(f"; {word} belongs in front of --args")
        elif word.endswith(".py"):
            hints.append("; behind --args stand a run's flags alone, without the script")
        elif word.startswith("--mhc"):  # what is near was said
            continue
        elif word.startswith("--"):
            hints.append(near(word, known_flags()))
    return "".join(hints)


def known_flags() -> list[str]:
    """All that Megatron's parser knows, ours among them."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    return list(add_megatron_arguments(parser)._option_string_actions)


def with_environment(flags: Sequence[str]) -> list[str]:
    """The flags and, where `--spec` alone turns mHC on, those of the MHC_* variables, which are
    taken out of the environment: such a run reads them."""
    flags = list(flags)
    spec = flags.index("--spec") + 1 if "--spec" in flags else len(flags)
    settings = [variable for variable in VARIABLES if variable in os.environ]
    if "--mhc" in flags or not settings or flags[spec : spec + 2] not in (SPEC, HYBRID_SPEC):
        return flags
    try:
        named = flags_of(config_from_environment()).split()
    except ValueError as error:
        raise FlagsError(f"these settings are refused: {error}") from error
    for variable in settings:
        del os.environ[variable]
    return flags + named


def parse(flags: Sequence[str]) -> argparse.Namespace:
    """The flags as a training run would have them, validated.

    Raises:
        FlagsError: says what Megatron or mHC says of them.
    """
    from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    if {"-h", "--help"} & {*flags}:  # with 0.19.2 Megatron's own help ends in a ValueError
        raise FlagsError(
            "behind --args stand a run's flags; doctor --help lists those in front of it, python -m"
            " megatron_mhc.run --help mHC's"
        )
    said = io.StringIO()
    before, sys.argv = sys.argv, ["doctor --args", *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints all of its arguments
            with contextlib.redirect_stderr(said):  # and pages of usage
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
    except SystemExit as error:
        last = said.getvalue().strip().rpartition("error: ")[2]
        raise FlagsError(f"these flags are refused: {last}{_meant(last)}") from error
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


def _why_not_served(mhc: MHCConfig) -> str | None:
    """Why the Triton kernels, whose bytes and times these are, do not serve it; None if they do."""
    if mhc.backend == "torch":
        return "backend torch"
    if mhc.num_streams not in TRITON_STREAMS:
        return f"{mhc.num_streams} streams have no kernels, the reference runs"
    return None if mhc.variant == "mhc" else f"variant {mhc.variant}"


def costs(args: argparse.Namespace, mhc: MHCConfig) -> list[str]:
    """The lines about mHC itself."""
    from megatron.training.training import num_floating_point_operations

    sites = Sites.of(args)
    parameters = parameters_of(mhc, sites, args.hidden_size)
    forward = forward_flops_a_token(mhc, sites, args.hidden_size)
    extra = training_flops_a_token(args, mhc)
    # the figure that --log-throughput divides by the time: with the patch it has mHC's in it
    whole = num_floating_point_operations(args, 1) / args.seq_length
    reason = _why_not_served(mhc)
    lines = [
        f"  {reason}: no estimate of a step's time, and it keeps more than the activations below,"
        " which are those of the Triton kernels of variant mhc"
    ] * (reason is not None)
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
    if _why_not_served(mhc):
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
        return row, [sum(map(sites_passed(args), layers_of(chunk))) for chunk in chunks]


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

    args = parse(with_environment(flags))
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
