"""The sites of a GPT in a `torch_dist` checkpoint: their keys, their start, writing, reading."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_mhc.config import MHCConfig
from megatron_mhc.model.connection import Head, HyperConnection
from megatron_mhc.model.stored_settings import SETTINGS_KEY, function_settings

from .new_checkpoint import ConvertError
from .torch_dist import Writer, read_object, read_tensors

LAYERS = "decoder.layers."
CONNECTIONS = ("attention_connection", "mlp_connection")
PARAMETERS = ("phi", "alpha", "bias")
HEAD = ("fn", "scale", "base")


class Sites(NamedTuple):
    """The parameters of a model's hyper-connections.

    Attributes:
        layers: by layer and name: `attention_connection.phi` [n*n + 2n, n*C], ... `mlp_connection`.
        head: fn [n, n*C], scale [1], base [n] of a learned head; else empty.
    """

    layers: dict[tuple[int, str], Tensor]
    head: dict[str, Tensor]


class Layout:
    """How a checkpoint names its layers: one key for a stack of them, or one key for each."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        numbers = {int(m[1]) for key in keys if (m := re.match(rf"{LAYERS}(\d+)\.", key))}
        stack = next(
            value.size[0]
            for key, value in keys.items()
            if key.startswith(LAYERS)
            and not key.startswith(f"{LAYERS}head.")  # of the last layer alone, in no stack
            and isinstance(value, TensorStorageMetadata)
        )
        self.stacked = not numbers
        self.layers = max(numbers) + 1 if numbers else stack

    def key(self, layer: int, name: str) -> str:
        """The key of a layer's item."""
        return f"{LAYERS}{name}" if self.stacked else f"{LAYERS}{layer}.{name}"

    def object_key(self, layer: int, name: str) -> str:
        """The key of a layer's item that is no tensor."""
        shard = f"shard_{layer}_{self.layers}" if self.stacked else "shard_0_1"
        return f"{self.key(layer, name)}/{shard}"

    def write_tensor(self, writer: Writer, layer: int, name: str, value: Tensor) -> None:
        """Write a layer's tensor."""
        writer.tensor(self.key(layer, name), value, layer, self.layers if self.stacked else None)

    def read(
        self, folder: Path, metadata: Metadata, names: tuple[str, ...]
    ) -> dict[tuple[int, str], Tensor]:
        """The tensors of these names of every layer, by layer and name.

        Raises:
            ValueError: a layer has none of a name, or a file is damaged; names it.
        """
        wanted = {(i, name): self.key(i, name) for i in range(self.layers) for name in names}
        stored = read_tensors(folder, metadata, set(wanted.values()))
        if not self.stacked:
            return {place: stored[key] for place, key in wanted.items()}
        return {(i, name): stored[key][i] for (i, name), key in wanted.items()}


def is_hybrid(keys: Collection[str]) -> bool:
    """Whether these are the keys of a HybridModel, which calls its last norm otherwise."""
    return any(key.startswith("decoder.final_norm.") for key in keys)


def sites_of(keys: Collection[str], layers: int) -> list[tuple[int, str]]:
    """The layer and the name of each site's parameters, in the order of the model.

    A GPT's layers have two each; a HybridModel's have that of the one sublayer that is there.
    """
    if not is_hybrid(keys):
        return [(layer, name) for layer in range(layers) for name in CONNECTIONS]
    names = {"self_attention": CONNECTIONS[0], "mlp": CONNECTIONS[1], "mixer": "mamba_connection"}
    inside = [re.match(rf"{LAYERS}(\d+)\.(\w+)\.", key) for key in keys]
    return sorted({(int(m[1]), names[m[2]]) for m in inside if m and m[2] in names})


def new_sites(mhc: MHCConfig, places: list[tuple[int, str]], hidden_size: int) -> Sites:
    """What mHC adds to a model with sites in these places, as a new one has it."""
    values = {
        (layer, f"{name}.{parameter}"): value.detach()
        for index, (layer, name) in enumerate(places)
        for parameter, value in HyperConnection(mhc, hidden_size, index).named_parameters()
    }
    head = Head(mhc, hidden_size).named_parameters() if mhc.learned_head else ()
    return Sites(values, {name: value.detach() for name, value in head})


def write_sites(writer: Writer, mhc: MHCConfig, layout: Layout, sites: Sites) -> None:
    """Write the sites' parameters and settings, and the head's."""
    for (layer, name), value in sites.layers.items():
        layout.write_tensor(writer, layer, name, value)
    for layer in range(layout.layers):
        writer.object(layout.object_key(layer, SETTINGS_KEY), function_settings(mhc))
    for name, value in sites.head.items():
        writer.tensor(layout.key(layout.layers - 1, f"head.{name}"), value)


def is_ours(key: str) -> bool:
    """Whether an item is one that mHC has added to a model."""
    name = re.sub(rf"^{re.escape(LAYERS)}(\d+\.)?", "", key)
    return name != key and name.startswith(
        (*(f"{site}." for site in (*CONNECTIONS, "mamba_connection")), "head.", SETTINGS_KEY)
    )


def read_sites(folder: Path, metadata: Metadata, layout: Layout) -> tuple[MHCConfig, Sites]:
    """The settings and the parameters of a checkpoint with mHC.

    Raises:
        ValueError: an item is missing or damaged, names it; or the variant is another one.
    """
    mhc = MHCConfig(**read_object(folder, metadata, layout.object_key(0, SETTINGS_KEY)))
    if mhc.variant != "mhc":
        raise ConvertError(
            f"{folder} is of variant {mhc.variant}, which no model but ours has: nothing to convert"
            " it to"
        )
    names = tuple(f"{c}.{p}" for c in CONNECTIONS for p in PARAMETERS)
    layers = layout.read(folder, metadata, names)
    head = {}
    if mhc.learned_head:
        keys = {name: layout.key(layout.layers - 1, f"head.{name}") for name in HEAD}
        stored = read_tensors(folder, metadata, set(keys.values()))
        head = {name: stored[key] for name, key in keys.items()}
    return mhc, Sites(layers, head)


def streams_of(phi: torch.Size, bias: torch.Size) -> tuple[int, int] | None:
    """n and C of a site whose parameters have these shapes; None if no site's have.

    Args:
        phi: [n*n + 2n, n*C].
        bias: [n*n + 2n].
    """
    for n in range(1, 65):
        if phi[:1] == bias == (n * n + 2 * n,) and len(phi) == 2 and phi[1] % n == 0:
            return n, phi[1] // n
    return None
