"""Folders of safetensors, as Hugging Face's checkpoints are: what is in them, single tensors, new.

A file is the length of its header (8 bytes, little-endian), the header as JSON (dtype, shape and
place of each tensor by name), and the tensors' bytes. Read and written here without a package: the
shards of a large model are looked at one header at a time, and a tensor is put in its place.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .new_checkpoint import ConvertError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The formats that a parameter of a site may be in."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 16 * 2**20


class Place(NamedTuple):
    """Where a tensor is: bytes `begin` to `end` of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _header(file: Path) -> dict[str, Place]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            if size < 8 or length > size - 8:
                raise ValueError("it is too short")
            entries = json.loads(stream.read(length))
            found = {
                name: Place(
                    file,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    *(8 + length + at for at in entry["data_offsets"]),
                )
                for name, entry in entries.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConvertError(
                f"{file} is no whole safetensors file ({error}): download or copy it again"
            ) from error
    if short := [name for name, place in found.items() if place.end > size]:
        raise ConvertError(f"{file} ends before {short[0]} does: download or copy it again")
    return found


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConvertError(f"{file} is no JSON ({error}): download or copy it again") from error


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json.

    Raises:
        ConvertError: there is none, or no JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ConvertError(f"{folder} has no config.json: give a Hugging Face checkpoint's folder")
    return _read_json(file)


def find_tensors(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Place]:
    """The tensors of a checkpoint whose name is wanted, in the order of their files.

    With an index, files without any of them need not be there.

    Raises:
        ConvertError: a file is missing, cut, or has not what the index says.
    """
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ConvertError(f"{folder} has no *.safetensors: give a Hugging Face checkpoint's")
        every = [item for file in files for item in _header(file).items()]
        return {name: place for name, place in every if wanted(name)}
    weight_map = _read_json(index).get("weight_map", {})
    found: dict[str, Place] = {}
    for shard in sorted({shard for name, shard in weight_map.items() if wanted(name)}):
        if not (folder / shard).is_file():
            raise ConvertError(
                f"{folder / shard} is missing, and {INDEX} names it: download it (of the shards,"
                " only those with hyper-connections are read)"
            )
        found |= _header(folder / shard)
    listed = [name for name in weight_map if wanted(name)]
    if missing := [name for name in listed if name not in found]:
        raise ConvertError(
            f"{INDEX} says that {missing[0]} is in {weight_map[missing[0]]}, and it is not:"
            " download both again"
        )
    return {name: found[name] for name in listed}


def read_tensor(place: Place) -> Tensor:
    """A tensor in its own dtype, one of DTYPES."""
    with place.file.open("rb") as stream:
        stream.seek(place.begin)
        data = bytearray(stream.read(place.end - place.begin))
    return torch.frombuffer(data, dtype=DTYPES[place.dtype]).view(place.shape)


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def put_tensor(place: Place, value: Tensor) -> None:
    """Write a tensor over the one in this place, in that one's dtype."""
    with place.file.open("r+b") as stream:
        stream.seek(place.begin)
        stream.write(_bytes(value.to(DTYPES[place.dtype])))


def write_file(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A new file with these tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, value in tensors.items():
        end = at + value.numel() * value.element_size()
        entry = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [at, end],
        }
        header[name], at = entry, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors' bytes begin at a multiple of 8
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            stream.write(_bytes(value))


def write_index(folder: Path, files: Iterable[str]) -> None:
    """The index of these files."""
    found = {name: place for file in files for name, place in _header(folder / file).items()}
    size = sum(place.end - place.begin for place in found.values())
    weight_map = {name: place.file.name for name, place in sorted(found.items())}
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
    (folder / INDEX).write_text(f"{text}\n")


def copy_folder(source: Path, target: Path, progress: Callable[[int, int], None]) -> None:
    """Copy what is in a folder into one that is there, but for what has a name with a dot in front.

    That is where git and Hugging Face's downloads keep second copies.
    """
    inside = [(file, file.relative_to(source)) for file in sorted(source.rglob("*"))]
    files = [
        (file, name)
        for file, name in inside
        if file.is_file() and not any(part.startswith(".") for part in name.parts)
    ]
    total = sum(file.stat().st_size for file, _ in files)
    done = 0
    for file, name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as read, (target / name).open("wb") as write:
            while data := read.read(_CHUNK):
                write.write(data)
                done += len(data)
                progress(done, total)
