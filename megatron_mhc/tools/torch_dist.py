"""Items of a `torch_dist` checkpoint as bytes: copied from one to another, or written anew.

Such a checkpoint is a folder of files, in which serialised tensors and objects stand one behind the
other, and `.metadata`, which says where each one lies (torch.distributed.checkpoint).
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

NEW_FILE = "__mhc_0.distcp"
_CHUNK = 16 * 2**20


def copy_items(
    source: Path,
    target: Path,
    old: Metadata,
    new: Metadata,
    wanted: Callable[[str], bool],
    progress: Callable[[int, int], None],
) -> None:
    """Copy items, file by file, each into the file of the same name, and note them in `new`.

    Args:
        source, target: folders of a checkpoint.
        old, new: their metadata.
        wanted: of an item's key, whether to copy it.
        progress: is told the bytes copied and those to copy.

    Raises:
        ValueError: a file is shorter than its metadata says.
    """
    items: dict[str, list[tuple[MetadataIndex, Any]]] = {}
    for index, place in old.storage_data.items():
        if wanted(index.fqn):
            items.setdefault(place.relative_path, []).append((index, place))
            new.state_dict_metadata[index.fqn] = old.state_dict_metadata[index.fqn]
    total = sum(place.length for places in items.values() for _, place in places)
    done = 0
    for name, places in items.items():
        with (source / name).open("rb") as read, (target / name).open("wb") as write:
            for index, place in sorted(places, key=lambda item: item[1].offset):
                transforms = getattr(place, "transform_descriptors", None)
                new.storage_data[index] = _StorageInfo(name, write.tell(), place.length, transforms)
                read.seek(place.offset)
                left = place.length
                while left:
                    data = read.read(min(_CHUNK, left))
                    if not data:
                        raise ValueError(f"{source / name} ends in the middle of {index.fqn}")
                    write.write(data)
                    left, done = left - len(data), done + len(data)
                    progress(done, total)
            _flush(write)


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
