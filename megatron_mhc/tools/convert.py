"""`python -m megatron_mhc convert`: an ordinary model's checkpoint becomes a start with mHC.

The model's weights are copied as bytes; the parameters and the settings of the sites are added. The
optimizer's state is left out: it has no place for the new parameters (in the distributed
optimizer's buckets every parameter would move), and Megatron starts a release without it.
"""

import pickle
import re
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_mhc.config import MHCConfig
from megatron_mhc.model.connection import Head, HyperConnection
from megatron_mhc.model.stored_settings import SETTINGS_KEY, function_settings
from megatron_mhc.start.flags import HYBRID_SPEC, SPEC

from .new_checkpoint import RELEASE, TRACKER, ConvertError, new_checkpoint
from .torch_dist import Writer, copy_items

_LAYERS = "decoder.layers."
_SUBLAYERS = {"attention": "self_attention", "mlp": "mlp"}
"""What a site is called, and the module of its sublayer, in the order of a GPT's layer."""
_COMMON = "common_state/shard_0_1"
_LEGACY_COMMON = "common.pt"
"""Where Megatron-Core 0.18 keeps what 0.19 keeps in `_COMMON`."""
PAST = ("optimizer", "chained_", "rng_state", "rerun_state_machine", "common_state")
"""How the keys of what is left out begin."""
_ANOTHER = "copy it again from where it was saved, or give the folder of an earlier iteration"
"""What to do about a checkpoint that is not whole."""


def _tracked(source: Path) -> Path:
    """The iteration's folder that the tracker of a `--save` folder names."""
    tracker = source / TRACKER
    last = tracker.read_text(errors="replace").strip()
    if last != RELEASE and not last.isdecimal():
        says = f"says {last[:40]!r}" if last else "is empty"
        raise ConvertError(
            f"{tracker} {says}, not the number of an iteration (or {RELEASE!r}): write the last"
            " saved iteration's number into it, or give that iteration's folder"
        )
    folder = source / (last if last == RELEASE else f"iter_{int(last):07d}")
    if not folder.is_dir():
        raise ConvertError(
            f"{tracker} says {last}, and there is no folder {folder}: bring it back, or give the"
            " folder of an iteration that is there"
        )
    return folder


def find_checkpoint(source: Path) -> Path:
    """The folder of one iteration: `source` itself, or the last one of a `--save` folder.

    Raises:
        ConvertError: there is none, or not in `torch_dist` format, or a file in it is missing.
    """
    folder = _tracked(source) if (source / TRACKER).is_file() else source
    if not folder.is_dir():
        raise ConvertError(f"there is no folder {folder}: give one that --save wrote to")
    metadata, format_ = (folder / name for name in (".metadata", "metadata.json"))
    if format_.is_file() and not metadata.is_file():
        # Megatron wrote it before the other; `cp FOLDER/*` passes over a name with a dot
        raise ConvertError(f"{metadata} is missing, so the folder is not whole: {_ANOTHER}")
    if metadata.is_file() and not format_.is_file():
        raise ConvertError(
            f"{folder} has no {format_.name}, as checkpoints of Megatron-FSDP have none"
            " (--ckpt-format fsdp_dtensor), and convert knows torch_dist alone: give one of those,"
            f" or, if this is one, {_ANOTHER}"
        )
    if not metadata.is_file():
        raise ConvertError(
            f"{folder} is no torch_dist checkpoint: give a folder that --save wrote to, which has"
            f" {TRACKER} in it, or one iteration's folder (another --ckpt-format must be saved anew"
            " in torch_dist first)"
        )
    return folder


def read_metadata(folder: Path) -> Metadata:
    """What a checkpoint says of its items.

    Raises:
        ConvertError: that is damaged.
    """
    try:
        metadata = FileSystemReader(str(folder)).read_metadata()
    except OSError:
        raise  # names the file and says why
    except Exception as error:  # a pickle that is cut or damaged raises what it likes
        raise ConvertError(
            f"{folder / '.metadata'} cannot be read ({error or type(error).__name__}), so it is cut"
            f" off or damaged: {_ANOTHER}"
        ) from error
    return metadata


def read_common(folder: Path) -> dict[str, Any]:
    """A checkpoint's common state: arguments, iteration, and what else is no tensor of the model.

    Raises:
        ConvertError: that is damaged.
    """
    from megatron.core.dist_checkpointing import load_common_state_dict

    try:
        with warnings.catch_warnings():
            # torch: that it is not distributed
            warnings.simplefilter("ignore", UserWarning)
            common: dict[str, Any] = load_common_state_dict(str(folder))
    except (Exception, CheckpointException) as error:  # torch's own is no Exception
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ConvertError(
            f"{folder} cannot be read ({why[-1].strip()}), so a file in it is missing or damaged:"
            f" {_ANOTHER}"
        ) from error
    return common


def _is_hybrid(keys: Collection[str]) -> bool:
    """Whether these are the keys of a HybridModel, which calls its last norm otherwise."""
    return any(key.startswith("decoder.final_norm.") for key in keys)


def _check_source(folder: Path, keys: Mapping[str, Any]) -> None:
    is_gpt = any(key.startswith(_LAYERS) and "self_attention." in key for key in keys)
    if "embedding.word_embeddings.weight" not in keys or not (is_gpt or _is_hybrid(keys)):
        raise ConvertError(f"{folder} has no weights of a GPT model ({_LAYERS}self_attention...)")
    if any(SETTINGS_KEY in key for key in keys):
        raise ConvertError(f"{folder} is of a model with mHC already")
    for part, what in (
        (".cross_attention.", "cross attention"),
        ("mtp.", "layers for multi-token prediction"),
    ):
        if any(part in key for key in keys):
            raise ConvertError(f"{folder} has {what}, which convert does not know")


class _Layout:
    """How a checkpoint names its layers: one key for a stack of them, or one key for each."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        numbers = {int(m[1]) for key in keys if (m := re.match(rf"{_LAYERS}(\d+)\.", key))}
        stack = next(
            value.size[0]
            for key, value in keys.items()
            if key.startswith(_LAYERS) and isinstance(value, TensorStorageMetadata)
        )
        self.stacked = not numbers
        self.layers = max(numbers) + 1 if numbers else stack

    def key(self, layer: int, name: str) -> str:
        return f"{_LAYERS}{name}" if self.stacked else f"{_LAYERS}{layer}.{name}"

    def write_tensor(self, writer: Writer, layer: int, name: str, value: Tensor) -> None:
        writer.tensor(self.key(layer, name), value, layer, self.layers if self.stacked else None)

    def write_object(self, writer: Writer, layer: int, name: str, value: Any) -> None:
        shard = f"shard_{layer}_{self.layers}" if self.stacked else "shard_0_1"
        writer.object(f"{self.key(layer, name)}/{shard}", value)


def sites_of(keys: Collection[str], layers: int) -> list[tuple[int, str]]:
    """The layer and the name of each site's parameters, in the order of the model.

    A GPT's layers have two each; a HybridModel's have that of the one sublayer that is there.
    """
    if not _is_hybrid(keys):
        return [(layer, f"{half}_connection") for layer in range(layers) for half in _SUBLAYERS]
    found = {}
    for key in keys:
        inside = re.match(rf"{_LAYERS}(\d+)\.(\w+)\.", key)
        if inside and inside[2] in _SUBLAYERS.values():
            (name,) = (name for name, module in _SUBLAYERS.items() if module == inside[2])
            found[int(inside[1])] = f"{name}_connection"
        elif inside and inside[2] == "mixer":
            found[int(inside[1])] = "mamba_connection"
    return sorted(found.items())


def _write_mhc(writer: Writer, mhc: MHCConfig, keys: Mapping[str, Any]) -> None:
    """Every parameter that mHC adds, at its start, and the settings of each layer."""
    layout = _Layout(keys)
    hidden_size = keys["embedding.word_embeddings.weight"].size[-1]
    for index, (layer, site) in enumerate(sites_of(keys, layout.layers)):
        for name, value in HyperConnection(mhc, hidden_size, index).named_parameters():
            layout.write_tensor(writer, layer, f"{site}.{name}", value.detach())
    for layer in range(layout.layers):
        layout.write_object(writer, layer, SETTINGS_KEY, function_settings(mhc))
    if mhc.learned_head:  # of the last layer alone, in no stack
        for name, value in Head(mhc, hidden_size).named_parameters():
            writer.tensor(layout.key(layout.layers - 1, f"head.{name}"), value.detach())


def without_past(common: Mapping[str, Any]) -> dict[str, Any]:
    """The common state of a start: the source's, without what belongs to a run."""
    past = {"optimizer", "opt_param_scheduler", "rerun_state_machine"}
    start = {key: value for key, value in common.items() if key not in past}
    start |= {"iteration": 0, "num_floating_point_operations_so_far": 0}
    args = start.get("args")
    if args is not None:
        args.iteration = 0
        args.consumed_train_samples = args.consumed_valid_samples = args.skipped_train_samples = 0
        args.no_save_optim = args.no_save_rng = args.mhc = True
    return start


def _start_of(common: Mapping[str, Any], mhc: MHCConfig, spec: list[str]) -> dict[str, Any]:
    """The common state of a start with mHC."""
    start = without_past(common)
    args = start.get("args")
    if args is not None:
        for name, value in asdict(mhc).items():
            setattr(args, f"mhc_{name}", value)
        args.mhc_base_spec, args.spec = getattr(args, "spec", None), list(spec)
    return start


def _print_progress() -> Callable[[int, int], None]:
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 2:
            last = time.monotonic()
            print(f"convert: copied {done / 2**30:.2f} of {total / 2**30:.2f} GiB", flush=True)

    return progress


def write_common(folder: Path, made: Path, writer: Writer, common: Mapping[str, Any]) -> None:
    """Write the common state of a new checkpoint as the one in `folder` has it."""
    if (folder / _LEGACY_COMMON).is_file():
        torch.save(common, made / _LEGACY_COMMON)
    else:
        writer.object(_COMMON, common)


def _write(folder: Path, made: Path, mhc: MHCConfig) -> None:
    old = read_metadata(folder)
    keys = old.state_dict_metadata
    _check_source(folder, keys)
    common = _start_of(read_common(folder), mhc, HYBRID_SPEC if _is_hybrid(keys) else SPEC)
    new = replace(old, state_dict_metadata={}, storage_data={})
    is_model = lambda key: not key.startswith(PAST)  # noqa: E731
    try:
        copy_items(folder, made, old, new, is_model, _print_progress())
    except (FileNotFoundError, ValueError) as error:  # they name the file
        raise ConvertError(f"{error}: {_ANOTHER}") from error
    with Writer(made, new) as writer:
        _write_mhc(writer, mhc, keys)
        write_common(folder, made, writer, common)
    (made / ".metadata").write_bytes(pickle.dumps(new))
    shutil.copy(folder / "metadata.json", made)


def convert(source: Path, target: Path, mhc: MHCConfig) -> Path:
    """Write a start with mHC from an ordinary model's checkpoint, which is only read.

    The target appears under its name when it is whole, or not at all.

    Args:
        source: a folder that Megatron's `--save` wrote to, or one iteration's folder in it.
        target: what `--load` is to name; must not exist.
        mhc: the settings of the new model.

    Returns:
        The folder of the new checkpoint, below `target`.

    Raises:
        ConvertError: says what is wrong with either.
    """
    with new_checkpoint(target) as made:
        _write(find_checkpoint(source), made, mhc)
    return target / RELEASE
