"""Patches of Megatron's loaders of checkpoints: a look at one before it is loaded."""

import functools
import io
import re
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch.distributed import checkpoint

from .registry import Patch

_model: ContextVar[list[Any] | None] = ContextVar("model_to_load", default=None)


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


def _note_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_checkpoint(ddp_model: list[Any], *rest: Any, **kwargs: Any) -> Any:
        token = _model.set(ddp_model)
        try:
            return original(ddp_model, *rest, **kwargs)
        finally:
            _model.reset(token)

    return load_checkpoint


def _keep(kept: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def keep(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def preprocess(args: Any, raw_state_dict: Any, *rest: Any, **kwargs: Any) -> Any:
            model = raw_state_dict["model"]
            ours = {key: value for key, value in model.items() if key.endswith(kept)}
            state = original(args, raw_state_dict, *rest, **kwargs)
            state["model"].update(ours)
            return state

        return preprocess

    return keep


def state_dict_load_patches(
    check: Callable[[Any, Mapping[str, Any], str], None], kept: str
) -> tuple[Patch, ...]:
    """`check(chunk, state, folder)` runs for each chunk of a model that is about to be loaded.

    For what does not go through `dist_checkpointing.load`: the legacy format, local checkpoints and
    Megatron-FSDP's. Not where the state is loaded: Megatron tries again there without what does not
    fit.

    Args:
        check: called with a chunk without its wrappers, its state dict in the checkpoint (of
            Megatron-FSDP's format what ends in `kept` alone) and where that is.
        kept: how the keys of a model's objects end that Megatron-FSDP's format is to have.
    """

    def look(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _load_base_checkpoint(
            load_dir: Any, args: Any, rank0: bool = False, *rest: Any, **kwargs: Any
        ) -> Any:
            from megatron.core.utils import unwrap_model

            chunks = [] if rank0 else unwrap_model(_model.get() or [])
            is_fsdp = getattr(args, "use_megatron_fsdp", False)
            if chunks and is_fsdp:
                # before: torch stops over the first parameter that is missing
                _, name, _, kind = original(load_dir, args, True)
                if kind is not None and kind.name == "FSDP_DTENSOR":
                    # Megatron leaves an inner wrapper around it
                    core = unwrap_model(getattr(chunks[0], "module", chunks[0]))
                    check(core, _first_object(name, kept), name)
            loaded = original(load_dir, args, rank0, *rest, **kwargs)
            state, name, *_ = loaded
            if state is not None and not is_fsdp:
                for index, chunk in enumerate(chunks):
                    key = "model" if len(chunks) == 1 else f"model{index}"
                    if key in state:
                        check(chunk, state[key], str(name))
            return loaded

        return _load_base_checkpoint

    module = "megatron.training.checkpointing"
    why = "compares the mHC settings in a checkpoint of no distributed format with the model's"
    return (
        Patch("checkpoint-load-state", f"{module}:_load_base_checkpoint", look, why),
        Patch("checkpoint-load-model", f"{module}:load_checkpoint", _note_model, why),
        Patch(
            "checkpoint-load-training",
            "megatron.training.training:load_checkpoint",
            _note_model,
            why,
        ),
        Patch(
            "checkpoint-fsdp",
            f"{module}:preprocess_fsdp_dtensor_state_dict",
            _keep(kept),
            "keeps the mHC settings in Megatron-FSDP's format, which leaves out all extra state",
        ),
    )


def _first_object(folder: str, ends: str) -> dict[str, dict[str, Any]]:
    """The first object of a model whose key ends so, in a checkpoint of Megatron-FSDP; or none.

    Such a checkpoint has an item for each entry of an object.
    """
    reader = checkpoint.FileSystemReader(folder)
    keys = [key for key in reader.read_metadata().state_dict_metadata if f".{ends}." in key]
    if not keys:
        return {}
    name = keys[0][: keys[0].index(f"{ends}.") + len(ends)]
    state: dict[str, Any] = {key: None for key in keys if key.startswith(f"{name}.")}
    checkpoint.load(state, storage_reader=reader, no_dist=True)
    own = re.sub(r"^model\.(module\.)*", "", name)
    return {own: {key.removeprefix(f"{name}."): value for key, value in state.items()}}
