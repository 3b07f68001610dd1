"""Folders of safetensors, as Hugging Face's checkpoints are: what is in them, single tensors, new.

Read and written by the `safetensors` library, which looks at a shard without reading its tensors.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .new_checkpoint import ConvertError
from .progress import progress

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The formats that a parameter of a site may be in."""
_CHUNK = 16 * 2**20


class Place(NamedTuple):
    """Where a tensor is, and what it is there."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def _library() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ConvertError(
            "Hugging Face's checkpoints want safetensors: pip install 'safetensors>=0.5'"
        ) from None
    return safetensors


def _open(file: Path) -> Any:
    library = _library()
    try:
        return library.safe_open(file, "pt")
    except library.SafetensorError as error:
        raise ConvertError(
            f"{file} is no whole safetensors file ({error}): download or copy it again"
        ) from error


def _header(file: Path) -> dict[str, Place]:
    with _open(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: Place(file, name, one.get_dtype(), tuple(one.get_shape()))
            for name, one in slices.items()
        }


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
    """A tensor in its own dtype."""
    with _open(place.file) as opened:
        return opened.get_tensor(place.name)


def replace_tensors(file: Path, new: Mapping[str, Tensor]) -> None:
    """Write a file again with these tensors in the place of its own, in the dtypes that they had.

    All of the file is in memory meanwhile: a shard is some GB.
    """
    with _open(file) as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name, value in new.items():
        tensors[name] = value.to(tensors[name].dtype)
    # not over what is mapped into memory
    beside = file.with_suffix(".new")
    write_file(beside, tensors, metadata)
    beside.replace(file)


def write_file(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """A new file with these tensors."""
    alone = {name: value.contiguous() for name, value in tensors.items()}
    kept = dict(metadata or {"format": "pt"})
    _library().torch.save_file(alone, file, metadata=kept)


def _tensor_bytes(file: Path) -> int:
    """A file without its header, whose length is its first 8 bytes."""
    with file.open("rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def write_index(folder: Path, files: Sequence[str]) -> None:
    """The index of these files."""
    found = {name: place for file in files for name, place in _header(folder / file).items()}
    size = sum(map(_tensor_bytes, (folder / file for file in files)))
    weight_map = {name: place.file.name for name, place in sorted(found.items())}
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
    (folder / INDEX).write_text(f"{text}\n")


def copy_folder(source: Path, target: Path) -> None:
    """Copy what is in a folder into one that is there, but for what has a name with a dot in front.

    That is where git and Hugging Face's downloads keep second copies. Shows its progress.
    """
    inside = [(file, file.relative_to(source)) for file in sorted(source.rglob("*"))]
    files = [
        (file, name)
        for file, name in inside
        if file.is_file() and not any(part.startswith(".") for part in name.parts)
    ]
    total = sum(file.stat().st_size for file, _ in files)
    with progress("convert: copying", total, "B") as bar:
        for file, name in files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as read, (target / name).open("wb") as write:
                while data := read.read(_CHUNK):
                    write.write(data)
                    bar.update(len(data))
