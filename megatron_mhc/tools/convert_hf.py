"""`convert --from hf` and `--to hf`: the hyper-connections of a Hugging Face checkpoint.

The rest of the model is mapped by what the user has for it (Megatron-Bridge, a script): into an
ordinary torch_dist checkpoint on the way in, into a Hugging Face checkpoint on the way out.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_mhc.config import MHCConfig
from megatron_mhc.model.stored_settings import function_settings

from .convert import (
    check_ordinary,
    find_checkpoint,
    read_common,
    read_metadata,
    start_of,
    write_checkpoint,
)
from .hf_sites import NAMES, HFModel, as_hf, find_places, model_of, read_model
from .hf_sites import read_sites as read_hf_sites
from .new_checkpoint import RELEASE, ConvertError, new_checkpoint, new_folder
from .progress import progress
from .safetensors_files import (
    DTYPES,
    INDEX,
    SINGLE,
    Place,
    copy_folder,
    find_tensors,
    replace_tensors,
    write_file,
    write_index,
)
from .site_items import Layout, is_hybrid, is_ours, read_sites, write_sites

NEW_FILE = "hyper-connections.safetensors"
"""Where the tensors are that the other checkpoint has not."""


def from_hf(source: Path, target: Path, hf: Path) -> tuple[Path, MHCConfig, list[str]]:
    """Write a start with mHC from the rest of a model, and its hyper-connections at Hugging Face.

    Args:
        source: a checkpoint of Megatron's with the rest, as an ordinary GPT; it is only read.
        target: what `--load` is to name; must not exist.
        hf: the Hugging Face checkpoint's folder, of which no other tensor is read.

    Returns:
        The folder of the new checkpoint, its settings, and a report, a line a string.

    Raises:
        ConvertError: says what is wrong with any of them.
    """
    with new_checkpoint(target) as made:
        folder = find_checkpoint(source)
        keys = read_metadata(folder).state_dict_metadata
        check_ordinary(folder, keys)
        if is_hybrid(keys):
            raise ConvertError(f"{folder} is of a HybridModel: --from hf takes a GPT, give one's")
        layout = Layout(keys)
        width = keys["embedding.word_embeddings.weight"].size[-1]  # type: ignore[union-attr]
        model, sites, report = read_hf_sites(hf)
        if (layout.layers, width) != (model.layers, model.width):
            raise ConvertError(
                f"{folder} has {layout.layers} layers of width {width}, and {hf} {model.layers} of"
                f" width {model.width}: they are of two models, give both of one"
            )
        write_checkpoint(
            folder,
            made,
            lambda key: True,
            lambda writer: write_sites(writer, model.mhc, layout, sites),
            start_of(read_common(folder), model.mhc),
        )
    rest = f"all items of {folder} copied as they are; nothing else of {hf} was read"
    return target / RELEASE, model.mhc, [*report, f"{rest}; the optimizer begins anew"]


def to_hf(source: Path, target: Path, hf: Path | None = None) -> tuple[Path, list[str]]:
    """Write the hyper-connections of a checkpoint with mHC as a Hugging Face checkpoint has them.

    Args:
        source: a folder that Megatron's `--save` wrote to, or one iteration's folder in it.
        target: a new folder; must not exist.
        hf: a Hugging Face checkpoint with the rest, of which the target is a copy with these
            hyper-connections in it; None: they stand there alone, in fp32.

    Returns:
        The target, and a report, a line a string.

    Raises:
        ConvertError: says what is wrong with any of them, or that no model computes it.
    """
    with new_folder(target) as made:
        folder = find_checkpoint(source)
        metadata = read_metadata(folder)
        keys = metadata.state_dict_metadata
        if not any(map(is_ours, keys)):
            raise ConvertError(
                f"{folder} has no mHC of ours in it, and --to takes what has: give the --save"
                " folder of a run with --mhc"
            )
        if is_hybrid(keys):
            raise ConvertError(f"{folder} is of a HybridModel: --to hf takes a GPT, give one's")
        layout = Layout(keys)
        mhc, sites = read_sites(folder, metadata, layout)
        width = keys["embedding.word_embeddings.weight"].size[-1]  # type: ignore[union-attr]
        model = model_of(mhc, layout.layers, width)
        report = [
            f"{model.kind}: convention {mhc.convention_in_words}",
            f"{2 * layout.layers} sites, the n*n rows of fn and base from [dst, src] to [src, dst]",
            *(["the learned head: hc_head_*"] if sites.head else []),
        ]
        if drafts := [key for key in keys if key.startswith("mtp.") and "connection." in key]:
            report.append(
                f"no counterpart: {len(drafts)} items of multi-token prediction (mtp.*), whose"
                " layers compute another function there"
            )
        if hf is None:
            report += _write_alone(made, model, as_hf(model, sites, NAMES[model.kind]))
        else:
            _check_same(model, read_model(hf), hf)
            places, names, others = find_places(hf, model, NAMES[model.kind])
            tensors = as_hf(model, sites, names)
            copy_folder(hf, made)
            report += _write_into(made, tensors, places, hf)
            report += [f"left as they are in {hf}: {', '.join(others)}"] if others else []
    return target, report


def _write_alone(made: Path, model: HFModel, tensors: Mapping[str, Tensor]) -> list[str]:
    mhc = model.mhc
    write_file(made / NEW_FILE, tensors)
    write_index(made, [NEW_FILE])
    return [
        f"written alone, in float32, to {NEW_FILE}; --hf FOLDER puts them into a copy of that",
        f"its config.json must have hc_mult {mhc.num_streams}, hc_sinkhorn_iters"
        f" {mhc.sinkhorn_iterations}, hc_eps {mhc.pre_eps}, rms_norm_eps {mhc.norm_eps}",
    ]


def _check_same(ours: HFModel, theirs: HFModel, folder: Path) -> None:
    if (ours.layers, ours.width) != (theirs.layers, theirs.width):
        raise ConvertError(
            f"{folder} has {theirs.layers} layers of width {theirs.width}, and the checkpoint"
            f" {ours.layers} of width {ours.width}: they are of two models, give both of one"
        )
    stored, given = function_settings(theirs.mhc), function_settings(ours.mhc)
    wrong = [
        f"{name} is {stored[name]} there and {given[name]} in the checkpoint"
        for name in given
        if name != "convention" and given[name] != stored[name]
    ]
    if wrong:
        raise ConvertError(
            f"{folder / 'config.json'} is of a model that computes something else:"
            f" {', '.join(wrong)}: give the checkpoint of the model that this one was trained as"
        )


def _write_into(
    made: Path, tensors: Mapping[str, Tensor], places: Mapping[str, Place], hf: Path
) -> list[str]:
    """Put the tensors into a copy of the checkpoint in `hf`, where these have their places."""
    rounded = 0.0
    files = sorted({place.file.name for place in places.values()})
    with progress("convert: writing the hyper-connections", len(files), "files") as bar:
        for file in files:
            mine = {n: tensors[n] for n, place in places.items() if place.file.name == file}
            replace_tensors(made / file, mine)
            bar.update()
    for name, place in places.items():
        value = tensors[name]
        off = (value - value.to(DTYPES[place.dtype]).float()).abs().max()
        rounded = max(rounded, float(off))
    kinds = sorted({place.dtype for place in places.values()})
    report = []
    if places:
        loss = f", rounded by {rounded:.1e} at most" if rounded else ", digit for digit"
        report.append(f"{len(places)} tensors put in their places, {', '.join(kinds)} there{loss}")
    new = {name: value for name, value in tensors.items() if name not in places}
    if new:
        _add(made, new)
        report.append(f"{len(new)} tensors that {hf} lacks are in {NEW_FILE}, in float32")
    return report


def _add(made: Path, tensors: Mapping[str, Tensor]) -> None:
    """A further file, in the index too; a checkpoint of one file gets an index."""
    files = {place.file.name for place in find_tensors(made, lambda name: True).values()}
    write_file(made / NEW_FILE, tensors)
    if not (made / INDEX).is_file() and SINGLE in files:  # it would be taken for the whole
        files = files - {SINGLE} | {"model-00001-of-00002.safetensors"}
        (made / SINGLE).rename(made / "model-00001-of-00002.safetensors")
    write_index(made, [*sorted(files), NEW_FILE])
