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


def built_model_patches(check: Callable[[list[Any]], None]) -> tuple[Patch, ...]:
    """`check(model_chunks)` runs once a model stands, by whichever way the script builds it."""

    def setup(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            check(result[0])
            return result

        return setup_model_and_optimizer

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_model(*args: Any, **kwargs: Any) -> Any:
            model = original(*args, **kwargs)
            check(model)
            return model

        return get_model

    why = "checks that every layer has its sites and prints the banner"
    return (
        Patch("built-model", "megatron.training.training:setup_model_and_optimizer", setup, why),
        Patch("built-model-direct", "megatron.training.training:get_model", build, why),
    )
