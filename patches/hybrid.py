"""Patches of HybridModel and of the HybridStack that holds its layers.

A stack is built by its name inside multi-token prediction, and its layers are told too little to
know their place: the stack itself, once it stands, is the one place for all of them.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from .registry import Patch
from .supported_versions import is_installed


def hybrid_spec_patch(spec_of: Callable[[Any, Any, str | None], Any]) -> Patch:
    """`spec_of(spec, config, pattern)` returns the stack's spec that a HybridModel is built of.

    Megatron (up to 0.20) calls no spec that is a function there, as it does for a GPTModel.
    """

    def replace(original: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            given = bound.arguments
            pattern = given.get("hybrid_layer_pattern") or given.get("hybrid_override_pattern")
            given["hybrid_stack_spec"] = spec_of(
                given["hybrid_stack_spec"], given["config"], pattern
            )
            original(*bound.args, **bound.kwargs)

        return init

    return Patch(
        id="hybrid-spec",
        target="megatron.core.models.hybrid.hybrid_model:HybridModel.__init__",
        replace=replace,
        why="calls a spec that is a function, and notes the layer pattern of a model with mHC",
    )


def stack_patch(place: Callable[[Any], None]) -> Patch:
    """`place(stack)` runs behind the build of every HybridStack."""

    def replace(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            place(self)

        return init

    return Patch(
        id="stack-build",
        target="megatron.core.models.hybrid.hybrid_block:HybridStack.__init__",
        replace=replace,
        why="the first layer of a stack enters the streams and the last one leaves them",
    )


def gpt_checkpoint_patches(check: Callable[[list[Any]], None]) -> tuple[Patch, ...]:
    """`check(chunks)` runs where Megatron reads a GPT's checkpoint into this HybridModel.

    It renames what the model asks for, layer by layer, and would ask for one object twice. 0.18
    does no such thing: none there.
    """

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def setup(args: Any, ckpt_args: Any, model: list[Any]) -> Any:
            layers, with_optimizer = original(args, ckpt_args, model)
            if layers is not None:
                check(model)
            return layers, with_optimizer

        return setup

    patch = Patch(
        id="hybrid-gpt-checkpoint",
        target="megatron.training.checkpointing:_maybe_setup_gpt_to_hybrid_load",
        replace=replace,
        why="says how a GPT's checkpoint gets into a HybridModel with mHC",
    )
    return () if is_installed("<0.19") else (patch,)
