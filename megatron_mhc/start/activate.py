"""Turning mHC on in a training script: the plugin's patches, composed and applied."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_mhc.costs import formulas, recompute_plan
from megatron_mhc.costs.sites import Sites
from megatron_mhc.metrics import monitor
from megatron_mhc.model import config_marks, parameters, stored_settings
from megatron_mhc.patches import Patch, PatchError, registry
from megatron_mhc.patches.block_forward import block_forward_patches
from megatron_mhc.patches.checkpoint_load import (
    checkpoint_load_patch,
    state_dict_load_patches,
)
from megatron_mhc.patches.cpu import CPU_PATCHES, SHIPPED_HELPERS
from megatron_mhc.patches.fp32_shards import fp32_shards_patches
from megatron_mhc.patches.fsdp import fsdp_patches
from megatron_mhc.patches.hybrid import gpt_checkpoint_patches, hybrid_spec_patch, stack_patch
from megatron_mhc.patches.inference_wrapper import inference_wrapper_patch
from megatron_mhc.patches.layer_wise_gather import layer_wise_gather_patch
from megatron_mhc.patches.metrics import metrics_patch
from megatron_mhc.patches.mixed_gradients import mixed_gradients_patch
from megatron_mhc.patches.mtp import mtp_patch
from megatron_mhc.patches.optimizer_checkpoint import optimizer_checkpoint_patches
from megatron_mhc.patches.parameter_groups import parameter_group_patches
from megatron_mhc.patches.pipeline_schedule import pipeline_schedule_patches
from megatron_mhc.patches.pipeline_width import pipeline_width_patch
from megatron_mhc.patches.registry import ENVIRONMENT_VARIABLE, turned_off
from megatron_mhc.patches.schedule_plan import schedule_plan_patches
from megatron_mhc.patches.spec_function import spec_function_patches
from megatron_mhc.patches.supported_versions import check_release, megatron_core_version
from megatron_mhc.patches.throughput import throughput_patch
from megatron_mhc.patches.training import (
    arguments_patch,
    built_model_patches,
    checkpoint_arguments_patch,
    validation_patch,
    yaml_patch,
)

from . import banner, flags
from .refusals import FlagsError
from .suggestions import near, suggest


class _Seen:
    """What happened in this process, for the runner's last word.

    Attributes:
        parser: Megatron's parser was asked for.
        asked: its arguments had --mhc.
        banner: what was printed of a model that was checked.
    """

    parser = False
    asked = False
    banner: str | None = None


seen = _Seen()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    seen.parser = True
    suggest(flags.add_mhc_arguments(parser))


def _prepare_arguments(args: argparse.Namespace) -> None:
    with _refusing():
        flags.prepare_arguments(args)


def _check_arguments(args: argparse.Namespace) -> None:
    seen.asked = args.mhc
    with _refusing():
        flags.check_arguments(args)


def _refuse_yaml(args: Any) -> None:
    with _refusing():
        flags.refuse_yaml(args)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise FlagsError(str(error)) from error


def _check_built_model(chunks: list[torch.nn.Module], trained: bool) -> None:
    """Raise if mHC was asked for and is not there; print the banner once, where it is."""
    args = flags.megatron_arguments()
    if not getattr(args, "mhc", False):
        return
    with _refusing():
        config, source = flags.active_config()
        has_sites = banner.check_model(chunks, config, trained=trained)
    if not has_sites or seen.banner is not None:
        return
    sites = Sites.of(args)
    counts = (sites.built, formulas.parameters_of(config, sites, args.hidden_size))
    device = next((p.device for chunk in chunks for p in chunk.parameters()), None)
    if device is None:  # a pipeline stage that hands on what it gets
        return
    plan = recompute_plan.plan_of(chunks)
    seen.banner = banner.banner(config, source, *counts, device, args.params_dtype, plan)
    banner.print_banner(seen.banner)


def _run_schedule(name: str, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """`schedule.run_overlapped`, imported when there is a schedule to run."""
    from megatron_mhc.pipeline.schedule import run_overlapped

    return run_overlapped(name, original, arguments)


def _extra_flops_a_token(args: argparse.Namespace) -> float:
    """mHC's FLOPs a token of a training step, none where it is off."""
    if not getattr(args, "mhc", False):
        return 0.0
    return formulas.training_flops_a_token(args, flags.config_from_arguments(args))


def _like_decoder(decoder: Any, mtp: Any) -> Any:
    """`specs.like_decoder`, imported when there is a model to build."""
    from megatron_mhc.model.specs import like_decoder

    return like_decoder(decoder, mtp)


def _begin(block: Any, inference_context: Any) -> Any:
    """`arrange.begin`, imported when there is a model to run."""
    from megatron_mhc.model.arrange import begin

    return begin(block, inference_context)


def _check_inference(model: Any) -> None:
    """`inference.check_model`, imported when there is a model to run."""
    from megatron_mhc.model.inference import check_model

    check_model(model)


def _place(stack: Any) -> None:
    """`stack.place`, imported when there is a HybridStack to build."""
    from megatron_mhc.model.stack import place

    place(stack)


def _stack_spec(spec: Any, config: Any, pattern: str | None) -> Any:
    """`stack.stack_spec`, the same."""
    from megatron_mhc.model.stack import stack_spec

    return stack_spec(spec, config, pattern)


def _prepare_plan(model: Any) -> None:
    """`expert_overlap.prepare`, imported when there is a schedule to plan."""
    from megatron_mhc.pipeline.expert_overlap import prepare

    prepare(model)


def _prepare_fsdp(module: Any, ddp_config: Any) -> None:
    """`sharding.prepare_fsdp`, imported when there is a model to wrap."""
    from megatron_mhc.model.sharding import prepare_fsdp

    prepare_fsdp(module, ddp_config)


def _refuse_torch_fsdp(module: Any) -> None:
    """`sharding.refuse_torch_fsdp`, the same."""
    from megatron_mhc.model.sharding import refuse_torch_fsdp

    refuse_torch_fsdp(module)


def spec_patch() -> Patch:
    """What a HybridModel needs before its `--spec` is looked at: the import of ours applies it."""
    return hybrid_spec_patch(_stack_spec)


def model_patches() -> tuple[Patch, ...]:
    """What every model with mHC needs, however it was turned on; `with_mhc` applies them."""
    return (
        *parameter_group_patches(parameters.MARK),
        layer_wise_gather_patch(),
        mixed_gradients_patch(),
        *fp32_shards_patches(),
        *optimizer_checkpoint_patches(),
        checkpoint_load_patch(stored_settings.check_load),
        pipeline_width_patch(config_marks.message_width),
        *pipeline_schedule_patches(_run_schedule),
        mtp_patch(_like_decoder),
        *block_forward_patches(_begin),
        inference_wrapper_patch(_check_inference),
        spec_patch(),
        stack_patch(_place),
        *schedule_plan_patches(_prepare_plan),
        *fsdp_patches(_prepare_fsdp, _refuse_torch_fsdp, parameters.MARK),
    )


def loader_patches() -> tuple[Patch, ...]:
    """For Megatron's own loader of checkpoints; none where a library user has not imported it."""
    if "megatron.training.training" not in sys.modules:
        return ()
    return _loader_patches()


def _loader_patches() -> tuple[Patch, ...]:
    return (
        *state_dict_load_patches(stored_settings.check_state_dict, stored_settings.SETTINGS_KEY),
        *gpt_checkpoint_patches(stored_settings.refuse_gpt),
    )


def plugin_patches() -> tuple[Patch, ...]:
    """Every patch that `activate` applies, in order."""
    return (
        arguments_patch(_add_arguments),
        checkpoint_arguments_patch(flags.take_from_checkpoint),
        validation_patch(_prepare_arguments, _check_arguments),
        yaml_patch(_refuse_yaml),
        *built_model_patches(_check_built_model),
        metrics_patch(monitor.observe),
        *spec_function_patches(),
        throughput_patch(_extra_flops_a_token),
        *model_patches(),
        *_loader_patches(),
        SHIPPED_HELPERS,
    )


def check_turned_off() -> None:
    """Refuse ids in the environment variable that turn nothing off.

    Not the registry's to do: it gets the patches a few at a time, and knows only those that came.

    Raises:
        PatchError: names each such id, those that are spelled much alike, and where all are listed.
    """
    known = {patch.id for patch in (*plugin_patches(), *CPU_PATCHES)}
    if unknown := turned_off() - known:
        meant = "".join(near(name, known) for name in sorted(unknown))
        raise PatchError(
            f"{ENVIRONMENT_VARIABLE} turns off {', '.join(sorted(unknown))}, and with Megatron-Core"
            f" {megatron_core_version()} there is no such patch{meant}. With"
            f" {ENVIRONMENT_VARIABLE} unset, `python -m megatron_mhc doctor --patches` lists all"
        )


def activate() -> None:
    """Teach this process's Megatron the `--mhc*` flags. Once is enough; again changes nothing.

    Raises:
        UnsupportedMegatronError: Megatron-Core is missing or of a release that is not supported.
        PatchError: something that a patch changes is not there, or the environment turns off a
            patch that does not exist.
    """
    check_release()
    check_turned_off()
    registry.apply(*plugin_patches())
