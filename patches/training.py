"""Patches of megatron.training: the flags, their check, and a look at the finished model."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

from .registry import Patch


def arguments_patch(add: Callable[[argparse.ArgumentParser], Any]) -> Patch:
    """`add(parser)` runs after Megatron has added its own arguments."""

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser = original(parser)
            add(parser)
            return parser

        return add_megatron_arguments

    return Patch(
        id="arguments",
        target="megatron.training.arguments:add_megatron_arguments",
        replace=replace,
        why="adds the --mhc flags to Megatron's parser",
    )


def validation_patch(
    before: Callable[[argparse.Namespace], None], after: Callable[[argparse.Namespace], None]
) -> Patch:
    """`before(args)` and `after(args)` run around Megatron's validation of its arguments."""

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def validate_args(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
            before(args)
            result = original(args, *rest, **kwargs)
            after(args)
            return result

        return validate_args

    return Patch(
        id="validation",
        target="megatron.training.arguments:validate_args",
        replace=replace,
        why="sets --spec for --mhc and refuses flags that mHC cannot work with",
    )


def checkpoint_arguments_patch(
    take: Callable[[argparse.Namespace, Any, argparse.Namespace], None],
) -> Patch:
    """`take(args, spec, stored)` runs after Megatron has taken arguments from a checkpoint.

    `spec` is what `args.spec` was before, `stored` are the checkpoint's arguments.
    """

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load_args_from_checkpoint(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
            spec = args.spec
            result = original(args, *rest, **kwargs)
            if isinstance(result, tuple):  # else there was nothing to take
                take(args, spec, result[1])
            return result

        return load_args_from_checkpoint

    return Patch(
        id="checkpoint-arguments",
        target="megatron.training.checkpointing:load_args_from_checkpoint",
        replace=replace,
        why="takes mHC's settings and the spec around which it is from a checkpoint",
    )


def yaml_patch(check: Callable[[Any], None]) -> Patch:
    """`check(args)` runs with the arguments that `--yaml-cfg` brings instead of the flags."""

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load_yaml(*args: Any, **kwargs: Any) -> Any:
            loaded = original(*args, **kwargs)
            check(loaded)
            return loaded

        return load_yaml

    return Patch(
        id="yaml",
        target="megatron.training.yaml_arguments:load_yaml",
        replace=replace,
        why="refuses --mhc beside --yaml-cfg, which ignores every flag",
    )


def built_model_patches(check: Callable[[list[Any], bool], None]) -> tuple[Patch, ...]:
    """`check(model_chunks, trained)` runs once a model stands, by whichever way it is built.

    `trained` is true of the run's own model and of whatever gets one of Megatron's optimizers.
    """

    def setup(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            check(result[0], True)
            return result

        return setup_model_and_optimizer

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_model(*args: Any, **kwargs: Any) -> Any:
            model = original(*args, **kwargs)
            check(model, False)
            return model

        return get_model

    def optimize(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _get_param_groups(chunks: Any, *args: Any, **kwargs: Any) -> Any:
            check(chunks, True)
            return original(chunks, *args, **kwargs)

        return _get_param_groups

    training = "megatron.training.training"
    why = "checks that mHC is where it was asked for and prints the banner"
    return (
        Patch("built-model", f"{training}:setup_model_and_optimizer", setup, why),
        Patch("built-model-direct", f"{training}:get_model", build, why),
        # scripts import get_megatron_optimizer by name; this they all come through
        Patch(
            "built-model-optimizer",
            "megatron.core.optimizer:_get_param_groups",
            optimize,
            "checks that no ordinary model is trained where mHC was asked for",
        ),
    )
