"""`python -m megatron_mhc convert`: an ordinary model's checkpoint becomes a start with mHC.

The model's weights are copied as bytes; the parameters and the settings of the sites are added. The
optimizer's state is left out: it has no place for the new parameters (in the distributed
optimizer's buckets every parameter would move), and Megatron starts a release without it.
"""

import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_mhc.config import MHCConfig
from megatron_mhc.model.stored_settings import SETTINGS_KEY
from megatron_mhc.start.flags import HYBRID_SPEC, SPEC

from .new_checkpoint import ANOTHER, RELEASE, TRACKER, ConvertError, new_checkpoint
from .site_items import LAYERS, Layout, is_hybrid, new_sites, sites_of, write_sites
from .torch_dist import Writer, copy_items

_COMMON = "common_state/shard_0_1"
_LEGACY_COMMON = "common.pt"
"""Where Megatron-Core 0.18 keeps what 0.19 keeps in `_COMMON`."""
PAST = ("optimizer", "chained_", "rng_state", "rerun_state_machine", "common_state")
"""How the keys of what is left out begin."""


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
        raise ConvertError(f"{metadata} is missing, so the folder is not whole: {ANOTHER}")
    if metadata.is_file() and not format_.is_file():
        raise ConvertError(
            f"{folder} has no {format_.name}, as checkpoints of Megatron-FSDP have none"
            " (--ckpt-format fsdp_dtensor), and convert knows torch_dist alone: give one of those,"
            f" or, if this is one, {ANOTHER}"
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
            f" off or damaged: {ANOTHER}"
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
            f" {ANOTHER}"
        ) from error
    return common


def check_ordinary(folder: Path, keys: Mapping[str, Any]) -> None:
    """Whether these are the keys of an ordinary model's checkpoint, a GPT's or a HybridModel's.

    Raises:
        ConvertError: of which model else they are.
    """
    is_gpt = any(key.startswith(LAYERS) and "self_attention." in key for key in keys)
    if "embedding.word_embeddings.weight" not in keys or not (is_gpt or is_hybrid(keys)):
        raise ConvertError(
            f"{folder} has no weights of a GPT model or HybridModel (embedding.word_embeddings and"
            f" {LAYERS}...): convert knows no other; give the checkpoint of one"
        )
    if any(SETTINGS_KEY in key for key in keys):
        raise ConvertError(
            f"{folder} is of a model with mHC already: --load it as it is (--finetune begins anew),"
            " or give --to for another model's"
        )
    if any("hyper_connection." in key for key in keys):
        raise ConvertError(f"{folder} is of a model with Megatron's own mHC: give --from megatron")
    for part, what in (
        (".cross_attention.", "cross attention"),
        ("mtp.", "layers for multi-token prediction"),
    ):
        if any(part in key for key in keys):
            raise ConvertError(
                f"{folder} has {what}, which convert does not know: give a model without, or train"
                " with --mhc from the beginning"
            )


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


def start_of(common: Mapping[str, Any], mhc: MHCConfig, spec: list[str] = SPEC) -> dict[str, Any]:
    """The common state of a start with mHC."""
    start = without_past(common)
    args = start.get("args")
    if args is not None:
        for name, value in asdict(mhc).items():
            setattr(args, f"mhc_{name}", value)
        args.mhc_base_spec, args.spec = getattr(args, "spec", None), list(spec)
    return start


def write_common(folder: Path, made: Path, writer: Writer, common: Mapping[str, Any]) -> None:
    """Write the common state of a new checkpoint as the one in `folder` has it."""
    if (folder / _LEGACY_COMMON).is_file():
        torch.save(common, made / _LEGACY_COMMON)
    else:
        writer.object(_COMMON, common)


def write_checkpoint(
    folder: Path,
    made: Path,
    wanted: Callable[[str], bool],
    fill: Callable[[Writer], None],
    common: Mapping[str, Any],
) -> None:
    """Write into `made` what is wanted of the model in `folder`, as bytes, and what is new.

    Args:
        folder: the source.
        made: the new checkpoint's folder, empty.
        wanted: of the key of an item of the model, whether it is copied.
        fill: writes the new items.
        common: the new common state.

    Raises:
        ConvertError: a file of the source is missing or short.
    """
    old = read_metadata(folder)
    new = replace(old, state_dict_metadata={}, storage_data={})
    is_wanted = lambda key: not key.startswith(PAST) and wanted(key)  # noqa: E731
    copy_items(folder, made, old, new, is_wanted)
    with Writer(made, new) as writer:
        fill(writer)
        write_common(folder, made, writer, common)
    (made / ".metadata").write_bytes(pickle.dumps(new))
    shutil.copy(folder / "metadata.json", made)


def _write(folder: Path, made: Path, mhc: MHCConfig) -> None:
    keys = read_metadata(folder).state_dict_metadata
    check_ordinary(folder, keys)
    layout = Layout(keys)
    width = keys["embedding.word_embeddings.weight"].size[-1]  # type: ignore[union-attr]
    start = new_sites(mhc, sites_of(keys, layout.layers), width)
    write_checkpoint(
        folder,
        made,
        lambda key: True,
        lambda writer: write_sites(writer, mhc, layout, start),
        start_of(read_common(folder), mhc, HYBRID_SPEC if is_hybrid(keys) else SPEC),
    )


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
