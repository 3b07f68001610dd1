"""Items of a `torch_dist` checkpoint as bytes: copied from one to another, or written anew.

Such a checkpoint is a folder of files, in which serialised tensors and objects stand one behind the
other, and `.metadata`, which says where each one lies (torch.distributed.checkpoint).
"""

import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from .new_checkpoint import ANOTHER, ConvertError
from .progress import progress

NEW_FILE = "__mhc_0.distcp"
_CHUNK = 16 * 2**20


def _load(folder: Path, state: dict[str, Any]) -> None:
    try:
        with warnings.catch_warnings():
            # torch: that it is not distributed
            warnings.simplefilter("ignore", UserWarning)
            checkpoint.load(state, checkpoint_id=str(folder), no_dist=True)
    except (Exception, CheckpointException) as error:  # torch's own is no Exception
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ConvertError(
            f"{folder} cannot be read ({why[-1].strip()}), so a file in it is missing or damaged:"
            f" {ANOTHER}"
        ) from error


def _check_there(folder: Path, metadata: Metadata, keys: Iterable[str]) -> None:
    missing = sorted(set(keys) - metadata.state_dict_metadata.keys())
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ValueError(
            f"{folder} lacks {', '.join(missing[:4])}{more}: it was saved by another version of the"
            " model, or its layers do not all have sites; give another checkpoint"
        )


def read_tensors(folder: Path, metadata: Metadata, keys: Iterable[str]) -> dict[str, Tensor]:
    """Whole tensors by their keys, in the dtypes that they are stored in.

    Raises:
        ValueError: one is not there, or a file is damaged.
    """
    keys = set(keys)
    _check_there(folder, metadata, keys)
    known: dict[str, Any] = {key: metadata.state_dict_metadata[key] for key in keys}
    state = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in known.items()}
    _load(folder, state)
    return state


def read_object(folder: Path, metadata: Metadata, key: str) -> Any:
    """What `Writer.object` wrote, or Megatron.

    Raises:
        ValueError: it is not there, or a file is damaged.
    """
    _check_there(folder, metadata, [key])
    state: dict[str, Any] = {key: io.BytesIO()}
    _load(folder, state)
    stored = state[key]
    if isinstance(stored, io.BytesIO):
        stored.seek(0)
        stored = torch.load(stored, weights_only=True)
    return stored[0]  # Megatron stores an object as a list of one


def copy_items(
    source: Path,
    target: Path,
    old: Metadata,
    new: Metadata,
    wanted: Callable[[str], bool],
) -> None:
    """Copy items, file by file, each into the file of the same name, and note them in `new`.

    Shows its progress.

    Args:
        source, target: folders of a checkpoint.
        old, new: their metadata.
        wanted: of an item's key, whether to copy it.

    Raises:
        ConvertError: a file is missing, or shorter than its metadata says.
    """
    items: dict[str, list[tuple[MetadataIndex, Any]]] = {}
    for index, place in old.storage_data.items():
        if wanted(index.fqn):
            items.setdefault(place.relative_path, []).append((index, place))
            new.state_dict_metadata[index.fqn] = old.state_dict_metadata[index.fqn]
    total = sum(place.length for places in items.values() for _, place in places)
    with progress("convert: copying", total, "B") as bar:
        for name, places in items.items():
            with (target / name).open("wb") as write:
                for index, place in sorted(places, key=lambda item: item[1].offset):
                    start = write.tell()
                    for data in parts(source, place, index.fqn):
                        write.write(data)
                        bar.update(len(data))
                    transforms = getattr(place, "transform_descriptors", None)
                    length = place.length
                    new.storage_data[index] = _StorageInfo(name, start, length, transforms)
                _flush(write)


def parts(folder: Path, place: Any, key: str) -> Iterator[bytes]:
    """The bytes of an item, whose place its metadata names, some MiB at a time.

    Raises:
        ConvertError: its file is missing, or ends before it does.
    """
    left = place.length
    try:
        with (folder / place.relative_path).open("rb") as read:
            read.seek(place.offset)
            while left:
                if not (data := read.read(min(_CHUNK, left))):
                    raise ConvertError(f"{read.name} ends in the middle of {key}: {ANOTHER}")
                yield data
                left -= len(data)
    except FileNotFoundError as error:  # names it
        raise ConvertError(f"{error}: {ANOTHER}") from error


def _flush(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


class Writer:
    """Writes new items into one file of a checkpoint and notes them in its metadata."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self._stream = (folder / NEW_FILE).open("wb")
        self._metadata = metadata

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        with self._stream:
            _flush(self._stream)

    def _write(self, index: MetadataIndex, value: Any) -> None:
        start = self._stream.tell()
        torch.save(value, self._stream)
        place = _StorageInfo(NEW_FILE, start, self._stream.tell() - start)
        self._metadata.storage_data[index] = place

    def tensor(self, key: str, value: Tensor, layer: int = 0, layers: int | None = None) -> None:
        """Write a tensor, or that of one layer of a stack of so many."""
        shape, offset = value.shape, torch.Size((0,) * value.dim())
        if layers is not None:
            shape, offset = torch.Size((layers, *shape)), torch.Size((layer, *offset))
            value = value.unsqueeze(0)
        self.part(key, value, offset, shape)

    def part(self, key: str, value: Tensor, offset: torch.Size, shape: torch.Size) -> None:
        """Write the part of a tensor of this shape that begins at the offset."""
        whole = self._metadata.state_dict_metadata.setdefault(
            key, TensorStorageMetadata(TensorProperties(value.dtype), shape, [])
        )
        whole.chunks.append(ChunkStorageMetadata(offset, value.shape))  # type: ignore[union-attr]
        self._write(MetadataIndex(key, offset), value.clone())

    def object(self, key: str, value: Any) -> None:
        """Write an object that `torch.load(..., weights_only=True)` reads."""
        self._metadata.state_dict_metadata[key] = BytesStorageMetadata()
        self._write(MetadataIndex(key), [value])  # Megatron stores an object as a list of one

    def stored_object(self, key: str, data: bytes) -> None:
        """Write an object as another checkpoint has it, unread."""
        self._metadata.state_dict_metadata[key] = BytesStorageMetadata()
        place = _StorageInfo(NEW_FILE, self._stream.tell(), self._stream.write(data))
        self._metadata.storage_data[MetadataIndex(key)] = place
