"""Patches that look at a checkpoint before it is loaded: at a distributed one, at a state dict."""

import functools
import io
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.distributed import checkpoint

from .registry import Patch


def checkpoint_load_patch(
    check: Callable[[Mapping[str, Any], Iterable[str], Callable[[str], Any], str], None],
) -> Patch:
    """`check(asked, stored_keys, read, folder)` runs in front of every load, on every rank.

    `asked` maps the checkpoint keys of what is to be loaded to the data that stand there now;
    `read(key)` returns one stored object (not a tensor).
    """

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load(sharded_state_dict: Any, checkpoint_dir: Any, *rest: Any, **kwargs: Any) -> Any:
            from megatron.core.dist_checkpointing.dict_utils import nested_values
            from megatron.core.dist_checkpointing.mapping import ShardedBase
            from megatron.core.dist_checkpointing.strategies.torch import _get_filesystem_reader
            from megatron.core.dist_checkpointing.validation import verify_checkpoint

            asked = {
                value.key: value.data
                for value in nested_values(sharded_state_dict)
                if isinstance(value, ShardedBase)
            }
            verify_checkpoint(str(checkpoint_dir))
            reader = _get_filesystem_reader(checkpoint_dir)
            keys = reader.read_metadata().state_dict_metadata

            def read(key: str) -> Any:
                state: dict[str, Any] = {key: io.BytesIO()}
                checkpoint.load(state, storage_reader=reader, no_dist=True)
                stored = state[key]
                if isinstance(stored, io.BytesIO):
                    stored.seek(0)
                    stored = torch.load(stored, weights_only=True)
                return stored[0]  # Megatron stores an object as a list of one

            check(asked, keys, read, str(checkpoint_dir))
            return original(sharded_state_dict, checkpoint_dir, *rest, **kwargs)

        return load

    return Patch(
        id="checkpoint-load",
        target="megatron.core.dist_checkpointing:load",
        replace=replace,
        why="compares the mHC settings in a checkpoint with the model's before it is loaded",
    )


def state_load_patch(check: Callable[[torch.nn.Module, Mapping[str, Any]], None]) -> Patch:
    """`check(model, state_dict)` runs before a language model loads a state dict of all of itself.

    Every format and every loader ends there; legacy checkpoints and local ones have no look at them
    before. A caller who says `strict=False` knows that something is missing.
    """

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load_state_dict(
            self: Any, state_dict: Any, strict: bool = True, *rest: Any, **kwargs: Any
        ) -> Any:
            # Megatron catches every error and loads once more without strict: that has to fail too
            if strict or sys.exception() is not None:
                check(self, state_dict)
            return original(self, state_dict, strict, *rest, **kwargs)

        return load_state_dict

    return Patch(
        id="state-load",
        target="megatron.core.models.common.language_module.language_module:"
        "LanguageModule.load_state_dict",
        replace=replace,
        why="compares the mHC settings in a state dict with the model's before it is loaded",
    )
