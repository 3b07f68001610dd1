"""`convert --hybrid-layer-pattern`: a GPT with mHC becomes the HybridModel of its halves.

Attention and MLP of a GPT's layer are two layers of a HybridModel, each with its site. So every
weight and every parameter of mHC is there already: it gets another name, and a layer that stood in
a stack of all layers stands alone. The new model computes the old one's function.
"""

import io
import pickle
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_mhc.costs.sites import segments_of
from megatron_mhc.model.stored_settings import SETTINGS_KEY
from megatron_mhc.start.flags import HYBRID_SPEC

from .convert import (
    PAST,
    find_checkpoint,
    read_common,
    read_metadata,
    without_past,
    write_common,
)
from .new_checkpoint import RELEASE, ConvertError, new_checkpoint
from .progress import progress
from .torch_dist import Writer, parts

_ATTENTION = ("input_layernorm.", "self_attention.", "attention_connection.")
_MLP = ("pre_mlp_layernorm.", "mlp.", "mlp_connection.")
_HEAD = "head."
"""What is behind the last MLP, and in no stack."""
_OUTPUT = "output_layer._extra_state/shard_0_1"
"""An object without content that a HybridModel's checkpoint has, and a GPT's has not."""
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_MTP_LAYER = re.compile(r"(mtp\.layers\.\d+)\.transformer_layer\.(.+)")
_OBJECT = re.compile(r"(.+)/shard_([\d.]+)_([\d.]+)")
_PAIRS = re.compile(r"(\|*[*+]\|*[-E])+(/[*+][-E])*")


def _halves(name: str) -> tuple[int, ...]:
    """Which of the two layers get this item of a GPT's layer: the attention (0), the MLP (1)."""
    if name.startswith(_ATTENTION):
        return (0,)
    if name.startswith((*_MLP, _HEAD)):
        return (1,)
    if name.startswith(SETTINGS_KEY):
        return (0, 1)
    raise ConvertError(
        f"{name} of a GPT's layer has no place in a HybridModel's: no HybridModel computes this"
        " GPT's function, go on with it as it is"
    )


def _renamed(key: str, layer: int | None) -> Iterator[str]:
    """The HybridModel's keys for a GPT's; `layer` is that of an item whose key does not say."""
    if inside := _LAYER.fullmatch(key):
        number = layer if inside[1] is None else int(inside[1])
        assert number is not None
        for half in _halves(inside[2]):
            yield f"decoder.layers.{2 * number + half}.{inside[2]}"
    elif inside := _MTP_LAYER.fullmatch(key):
        for half in _halves(inside[2]):
            yield f"{inside[1]}.mtp_model_layer.layers.{half}.{inside[2]}"
    else:
        yield key.replace("decoder.final_layernorm.", "decoder.final_norm.")


def _is_stacked(key: str) -> bool:
    """Whether this key is of a stack of all layers."""
    inside = _LAYER.fullmatch(key)
    return inside is not None and inside[1] is None and not inside[2].startswith(_HEAD)


def _alone(shard: str) -> str:
    """An object's place without its first axis: that of the stack of layers."""
    rest = [part.split(".", 1)[1:] for part in shard.split("_")]
    return "_".join(part[0] for part in rest) if all(rest) else "0_1"


class _Items:
    """The items of a checkpoint, read one by one."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self._folder, self.keys = folder, metadata.state_dict_metadata
        self._places = metadata.storage_data

    def of_model(self) -> Iterator[tuple[str, Size, Tensor | bytes]]:
        """Key, offset and value of every item but the optimizer's; an object's are its bytes.

        Shows its progress.
        """
        places = [(i, place) for i, place in self._places.items() if not i.fqn.startswith(PAST)]
        with progress("convert: copying", sum(p.length for _, p in places), "B") as bar:
            for index, place in places:
                data = b"".join(parts(self._folder, place, index.fqn))
                if isinstance(self.keys[index.fqn], TensorStorageMetadata):
                    yield index.fqn, index.offset, torch.load(io.BytesIO(data), weights_only=True)
                else:
                    yield index.fqn, Size(), data
                bar.update(place.length)


def _check(folder: Path, keys: Any, args: Any, pattern: str) -> None:
    if not any(SETTINGS_KEY in key for key in keys):
        raise ConvertError(
            f"{folder} has no mHC in it: convert it to a start with mHC first, without"
            " --hybrid-layer-pattern"
        )
    if any(key.startswith("decoder.final_norm.") for key in keys):
        raise ConvertError(f"{folder} is of a HybridModel already: --load it as it is")
    if not _PAIRS.fullmatch(pattern):
        raise ConvertError(
            f"--hybrid-layer-pattern {pattern}: a layer of a GPT becomes attention and an MLP, so"
            " the pattern must be of such pairs ('*-' or '*E'; '+' for latent attention), and have"
            " no layer that the checkpoint has no weights of"
        )
    layers, depths = segments_of(pattern), pattern.count("/")
    wanted = (getattr(args, "num_layers", None), getattr(args, "mtp_num_layers", None) or 0)
    if wanted[0] is not None and (sum(layers), depths) != (2 * wanted[0], wanted[1]):
        raise ConvertError(
            f"--hybrid-layer-pattern {pattern} has {sum(layers)} layers and {depths} depths of"
            f" multi-token prediction; the checkpoint's {wanted[0]} layers are {2 * wanted[0]} of a"
            f" HybridModel, and it has {wanted[1]} depths: give a pattern of as many"
        )


def _hybrid_start(common: dict[str, Any], pattern: str) -> dict[str, Any]:
    """The common state of a start: the GPT's, without its past, with the layers' new names."""
    start = without_past(common)
    args: Namespace | None = start.get("args")
    if args is not None:
        args.hybrid_layer_pattern, args.num_layers = pattern, sum(segments_of(pattern))
        args.mhc_base_spec, args.spec = None, list(HYBRID_SPEC)
    return start


def convert_to_hybrid(source: Path, target: Path, pattern: str) -> Path:
    """Write the HybridModel of a GPT with mHC, whose checkpoint is only read, as a start.

    Args:
        source: a folder that Megatron's `--save` wrote to, or one iteration's folder in it.
        target: what `--load` is to name; must not exist.
        pattern: the HybridModel's layers, two for each of the GPT's.

    Returns:
        The folder of the new checkpoint, below `target`.

    Raises:
        ConvertError: says what is wrong with any of them.
    """
    with new_checkpoint(target) as made:
        folder = find_checkpoint(source)
        old, common = read_metadata(folder), read_common(folder)
        items = _Items(folder, old)
        _check(folder, items.keys, common.get("args"), pattern)
        layers = sum(segments_of(pattern)) // 2
        new = replace(old, state_dict_metadata={}, storage_data={})
        with Writer(made, new) as writer:
            for key, offset, value in items.of_model():
                _write_renamed(writer, items, key, offset, value, layers - 1)
            writer.object(_OUTPUT, None)
            write_common(folder, made, writer, _hybrid_start(common, pattern))
        (made / ".metadata").write_bytes(pickle.dumps(new))
        shutil.copy(folder / "metadata.json", made)
    return target / RELEASE


def _write_renamed(
    writer: Writer, items: _Items, key: str, offset: Size, value: Tensor | bytes, last: int
) -> None:
    """Write one item of a GPT, whose last layer has this number, under its new keys."""
    if isinstance(value, bytes):
        found = _OBJECT.fullmatch(key)
        assert found, key
        name, at, shape = found.groups()
        place = f"{at}_{shape}"
        stacked = _is_stacked(name)
        for new in _renamed(name, int(at.split(".")[0])):
            writer.stored_object(f"{new}/shard_{_alone(place) if stacked else place}", value)
        return
    whole = items.keys[key].size  # type: ignore[union-attr]
    if not _is_stacked(key):
        for new in _renamed(key, last):
            writer.part(new, value, offset, whole)
        return
    for layer, part in enumerate(value, offset[0]):
        for new in _renamed(key, layer):
            writer.part(new, part, Size(offset[1:]), Size(whole[1:]))
