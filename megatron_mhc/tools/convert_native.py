"""`convert --from megatron` and `--to megatron`: Megatron's own mHC becomes ours, and back.

Every weight is copied as bytes; the parameters of the sites get their other names and order. Both
are starts: see `OPTIMIZER`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from megatron_mhc.config import MHCConfig

from .convert import (
    find_checkpoint,
    read_common,
    read_metadata,
    start_of,
    without_past,
    write_checkpoint,
)
from .native_sites import (
    AUGUST,
    DEV,
    HEAD_KEYS,
    NAMES,
    PARAMETERS,
    as_native,
    as_ours,
    check_native,
    epsilon_of,
    generation,
    is_native,
    native_arguments,
    settings,
    without_native,
    without_ours,
)
from .new_checkpoint import RELEASE, ConvertError, new_checkpoint
from .site_items import HEAD, Layout, Sites, is_ours, read_sites, streams_of, write_sites
from .torch_dist import Writer, read_tensors

OPTIMIZER = (
    "the optimizer begins anew, with iteration and schedule: its states stand in groups and buckets"
    " of parameters, and these are others now (three alphas or one, with weight decay or without)"
)
WHOSE = {
    AUGUST: "Megatron's main of August 2026",
    DEV: "Megatron's dev branch, or its main from September 2026 on",
}


def _rows(which: str) -> str:
    if which == AUGUST:
        return "rows of phi and bias as they are, [dst, src]"
    return "the n*n rows of phi and bias from [src, dst] to [dst, src]"


def _read(
    folder: Path, metadata: Metadata, layout: Layout
) -> tuple[dict[tuple[int, str], Tensor], int]:
    """Megatron's parameters of all sites, and n."""
    names = tuple(f"{native}.{name}" for native in NAMES.values() for name in PARAMETERS)
    values = layout.read(folder, metadata, names)
    weight, bias = (values[0, name].shape for name in names[:2])
    if (found := streams_of(weight, bias)) is None:
        raise ConvertError(
            f"{folder}: mapping_proj.weight {list(weight)} and bias {list(bias)} of a site are not"
            " [n*n + 2n, n*C] and [n*n + 2n]: they are of another mHC than those known here"
        )
    return values, found[0]


def from_native(
    source: Path, target: Path, given: Mapping[str, Any]
) -> tuple[Path, MHCConfig, list[str]]:
    """Write a start with our mHC from a GPT's checkpoint with Megatron's own, which is only read.

    Args:
        source: a folder that Megatron's `--save` wrote to, or one iteration's folder in it.
        target: what `--load` is to name; must not exist.
        given: fields of MHCConfig, for what the checkpoint does not say.

    Returns:
        The folder of the new checkpoint, its settings, and a report, a line a string.

    Raises:
        ConvertError: says what is wrong with any of them.
    """
    with new_checkpoint(target) as made:
        folder = find_checkpoint(source)
        metadata, common = read_metadata(folder), read_common(folder)
        keys, args = metadata.state_dict_metadata, common.get("args")
        check_native(folder, keys, args)
        layout = Layout(keys)
        values, streams = _read(folder, metadata, layout)
        mhc, why = settings(folder, keys, args, given, streams)
        which = DEV if mhc.norm_form == "outside_root" and mhc.pre_eps else AUGUST
        head = {}
        if mhc.learned_head:
            stored = read_tensors(folder, metadata, HEAD_KEYS.values())
            head = {name: stored[key].float() for name, key in HEAD_KEYS.items()}
        sites = Sites(as_ours(values, which, mhc.num_streams), head)
        spec = getattr(args, "spec", None)
        common = start_of(common, mhc)
        if args is not None:
            without_native(args)
        write_checkpoint(
            folder,
            made,
            lambda key: not is_native(key),
            lambda writer: write_sites(writer, mhc, layout, sites),
            common,
        )
    kind = next(iter(values.values())).dtype
    report = [
        f"{WHOSE[which]}, because {why}: convention {mhc.convention_in_words}",
        f"{2 * layout.layers} sites mapped, {_rows(which)}; three alphas are one"
        + ("" if kind == torch.float32 else f"; {kind} made float32"),
        *(["the learned head mapped: decoder.hc_head_*, of no layer there"] if head else []),
        *(
            [f"no counterpart: --spec {' '.join(spec)}, which builds the other sites"]
            if spec
            else []
        ),
        f"all other items of the model copied as they are; {OPTIMIZER}",
    ]
    return target / RELEASE, mhc, report


def check_gpt(folder: Path, keys: Mapping[str, Any]) -> None:
    """Whether Megatron's own mHC knows the kind of model that has these items.

    Raises:
        ConvertError: what it does not know.
    """
    for part, what in (
        ("mtp.", "multi-token prediction, which computes another function there"),
        ("decoder.final_norm.", "a HybridModel, whose layers have one site each"),
    ):
        if any(key.startswith(part) for key in keys):
            raise ConvertError(f"{folder} has {what}: --to megatron takes GPT models without")


def check_back(folder: Path, keys: Mapping[str, Any], args: Any, mhc: MHCConfig) -> str:
    """Which of Megatron's own mHC has a GPT with these items and settings: AUGUST or DEV.

    Raises:
        ConvertError: none has; says what it lacks.
    """
    which = generation(mhc)
    if which == AUGUST and any(".mlp.experts." in key or ".mlp.router." in key for key in keys):
        raise ConvertError(
            f"{folder} has layers with experts, which Megatron's main of August 2026 refuses beside"
            " its mHC: there is no model that could load it"
        )
    if mhc.learned_head and (epsilon := epsilon_of(args)) not in (None, mhc.head_eps):
        raise ConvertError(
            f"{folder} has head_eps {mhc.head_eps}, and norms with {epsilon}; Megatron's own head"
            " has the eps of the norms (--norm-epsilon), so no model of its computes this one. One"
            f" that is trained with --mhc-head-eps {epsilon} can go back"
        )
    return which


def _dtype(which: str, args: Any) -> torch.dtype:
    """Of the sites' parameters: the August main keeps them in the model's."""
    if which == AUGUST and getattr(args, "bf16", False):
        return torch.bfloat16
    return torch.float16 if which == AUGUST and getattr(args, "fp16", False) else torch.float32


def _native_start(common: dict[str, Any], mhc: MHCConfig, which: str) -> dict[str, Any]:
    start = without_past(common)
    if (args := start.get("args")) is not None:
        without_ours(args)
        for name, value in native_arguments(mhc, which).items():
            setattr(args, name, value)
    return start


def to_native(source: Path, target: Path) -> tuple[Path, list[str]]:
    """Write a start with Megatron's own mHC from a GPT's checkpoint with ours, which is only read.

    Args:
        source: a folder that Megatron's `--save` wrote to, or one iteration's folder in it.
        target: what `--load` is to name; must not exist.

    Returns:
        The folder of the new checkpoint, and a report, a line a string.

    Raises:
        ConvertError: says what is wrong with either, or that no mHC of Megatron's own computes it.
    """
    with new_checkpoint(target) as made:
        folder = find_checkpoint(source)
        metadata, common = read_metadata(folder), read_common(folder)
        keys = metadata.state_dict_metadata
        if not any(map(is_ours, keys)):
            raise ConvertError(
                f"{folder} has no mHC of ours in it, and --to takes what has: give the --save"
                " folder of a run with --mhc"
            )
        check_gpt(folder, keys)
        layout, args = Layout(keys), common.get("args")
        mhc, sites = read_sites(folder, metadata, layout)
        which = check_back(folder, keys, args, mhc)
        dtype = _dtype(which, args)
        values = as_native(sites, which, mhc.num_streams, dtype)

        def fill(writer: Writer) -> None:
            for (layer, name), value in values.items():
                layout.write_tensor(writer, layer, name, value)
            for name in HEAD if sites.head else ():
                writer.tensor(HEAD_KEYS[name], sites.head[name])

        common = _native_start(common, mhc, which)
        write_checkpoint(folder, made, lambda key: not is_ours(key), fill, common)
    report = [
        f"for {WHOSE[which]}: convention {mhc.convention_in_words}",
        f"{2 * layout.layers} sites mapped, {_rows(which)}; alpha is three"
        + ("" if dtype == torch.float32 else f"; rounded to {dtype}, which it keeps them in"),
        *(["the learned head mapped to decoder.hc_head_*"] if sites.head else []),
        *([f"its head's eps is --norm-epsilon there: give {mhc.head_eps}"] if sites.head else []),
        *(["no spec of that time builds these layers: give --spec"] if which == AUGUST else []),
        f"no counterpart: the settings of mHC, {layout.layers} objects, now in its arguments",
        f"all other items of the model copied as they are; {OPTIMIZER}",
    ]
    return target / RELEASE, report
