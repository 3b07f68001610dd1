"""The hyper-connections of DeepSeek-V4, V4.1 and GLM-5.3 at Hugging Face, as ours and back.

All three store a site as fn [n*n + 2n, n*C], base [n*n + 2n] and scale [3]; of the rows n are
H_pre's, n H_post's, and n*n H_res's as [src, dst], where ours are [dst, src]. DeepSeek-V4 has a
learned head too.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megatron_mhc.config import CONVENTION_FIELDS, MHCConfig
from megatron_mhc.kernels.reference import transpose_res_rows

from .new_checkpoint import ConvertError
from .safetensors_files import DTYPES, Place, find_tensors, read_config, read_tensor
from .site_items import HEAD, Sites

CONVENTIONS_OF = {
    "deepseek_v4": "deepseek_v4",
    "deepseek_v41": "deepseek_v4_1",
    "glm5_next": "glm_5_3",
}
"""The `model_type` of a config.json, and the convention; it may also end in `_text`."""
SITES = {"hc_attn": "attention_connection", "hc_ffn": "mlp_connection"}
PARTS = {"fn": "phi", "base": "bias", "scale": "alpha"}
_SITE = re.compile(r"(?P<prefix>.*?)layers\.(?P<layer>\d+)\.(?P<site>hc_attn|hc_ffn)_(?P<part>\w+)")
HEADS = ("hc_head_", "hc_head.hc_")
"""How the head's names begin: as DeepSeek published it; as transformers saves a new model."""


class Names(NamedTuple):
    """What differs in the tensors' names: in front of `layers.`, and how the head's begin."""

    prefix: str
    head: str = HEADS[0]


NAMES = {
    "deepseek_v4": Names(""),
    "deepseek_v41": Names(""),
    "glm5_next": Names("model.language_model."),
}
"""Those of the checkpoints that were published."""


class HFModel(NamedTuple):
    """What a config.json says.

    Attributes:
        kind: of CONVENTIONS_OF.
        mhc: our settings for it.
        layers, width: their number, and C.
        engram: the layers that have one, which is no hyper-connection and changes the streams.
    """

    kind: str
    mhc: MHCConfig
    layers: int
    width: int
    engram: tuple[int, ...] = ()


def is_hyper_connection(name: str) -> bool:
    """Whether a tensor of this name belongs to a hyper-connection."""
    return re.search(r"(^|\.)(hc_(attn|ffn|head)_|hc_head\.hc_)\w+$", name) is not None


def _is_main(name: str) -> bool:
    """Whether it is the model's own, not of a draft for multi-token prediction."""
    return not name.startswith("mtp.") and ".mtp." not in name


def read_model(folder: Path) -> HFModel:
    """The model whose checkpoint this is.

    Raises:
        ConvertError: it is another one, or config.json lacks a number.
    """
    whole = read_config(folder)
    config = {**whole, **(whole.get("text_config") or {})}
    named = str(whole.get("model_type"))
    kind = named.removesuffix("_text")
    if kind not in CONVENTIONS_OF:
        raise ConvertError(
            f"{folder / 'config.json'} has model_type {named}; known are"
            f" {', '.join(CONVENTIONS_OF)}: give one of these (a model without hyper-connections"
            " is converted without --from)"
        )
    names = ("hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "num_hidden_layers")
    if missing := [name for name in (*names, "hidden_size") if name not in config]:
        raise ConvertError(
            f"{folder / 'config.json'} lacks {', '.join(missing)}: save it whole (config.to_dict)"
        )
    if config.get("mhc_post_mult_value", 2.0) != 2.0:
        raise ConvertError(
            f"{folder / 'config.json'} has mhc_post_mult_value {config['mhc_post_mult_value']};"
            " ours is always 2, so no setting of ours computes this model"
        )
    mhc = MHCConfig(
        num_streams=config["hc_mult"],
        sinkhorn_iterations=config["hc_sinkhorn_iters"],
        convention=CONVENTIONS_OF[kind],
        norm_eps=config["rms_norm_eps"],
        pre_eps=config["hc_eps"],
        sinkhorn_eps=config["hc_eps"],
    )
    engram = tuple(config.get("engram_layer_ids") or ())
    return HFModel(kind, mhc, config["num_hidden_layers"], config["hidden_size"], engram)


def names_of(
    model: HFModel, names: Names
) -> dict[str, tuple[tuple[int, str] | str, tuple[int, ...]]]:
    """For each name our place (layer and name, or the head's part), and the tensor's shape."""
    n, width = model.mhc.num_streams, model.width
    rows = n * n + 2 * n
    shapes: dict[str, tuple[int, ...]] = {"fn": (rows, n * width), "base": (rows,), "scale": (3,)}
    found: dict[str, Any] = {
        f"{names.prefix}layers.{layer}.{site}_{part}": ((layer, f"{ours}.{PARTS[part]}"), shape)
        for layer in range(model.layers)
        for site, ours in SITES.items()
        for part, shape in shapes.items()
    }
    if model.mhc.learned_head:
        ends = {"fn": (n, n * width), "scale": (1,), "base": (n,)}
        found |= {f"{names.prefix}{names.head}{part}": (part, ends[part]) for part in HEAD}
    return found


def _names(folder: Path, tensors: Iterable[str], default: Names | None) -> Names:
    tensors = list(filter(_is_main, tensors))
    found = {match["prefix"] for name in tensors if (match := _SITE.fullmatch(name))}
    if not found and default is not None:
        return default
    if len(found) != 1:
        raise ConvertError(
            f"{folder} has hyper-connections (...layers.N.hc_attn_fn) "
            + (
                f"under {' and '.join(map(repr, sorted(found)))}: give a folder with one model"
                if found
                else "nowhere: give a checkpoint that has"
            )
        )
    of_transformers = any(HEADS[1] in name for name in tensors)
    return Names(found.pop(), HEADS[1] if of_transformers else HEADS[0])


def check_place(name: str, place: Place, wanted: tuple[int, ...], n: int) -> None:
    """Whether a tensor is what its name says.

    Raises:
        ConvertError: its shape or dtype is another one.
    """
    if place.dtype not in DTYPES:
        raise ConvertError(
            f"{name} in {place.file} is {place.dtype}; expected one of {', '.join(DTYPES)}: no"
            " hyper-connection is quantised in the models that are known here"
        )
    if place.shape != wanted:
        rows = f"{n} H_pre, {n} H_post, {n * n} H_res as [src, dst]; columns stream by stream"
        raise ConvertError(
            f"{name} in {place.file} has shape {list(place.shape)}, expected {list(wanted)}"
            + (f" (rows: {rows})" if len(wanted) == 2 else "")
            + ": config.json is another model's (hc_mult, hidden_size), or the tensor is transposed"
        )


def find_places(
    folder: Path, model: HFModel, default: Names | None = None
) -> tuple[dict[str, Place], Names, list[str]]:
    """The model's hyper-connections that are there, their names, and those without a counterpart.

    Args:
        folder: the checkpoint.
        model: its model.
        default: the names where there are none; else that is refused.

    Raises:
        ConvertError: one is not what its name says.
    """
    every = find_tensors(folder, is_hyper_connection)
    names = _names(folder, every, default)
    wanted = names_of(model, names)
    for name, place in every.items():
        if name in wanted:
            check_place(name, place, wanted[name][1], model.mhc.num_streams)
    return (
        {name: place for name, place in every.items() if name in wanted},
        names,
        [name for name in every if name not in wanted],
    )


def read_sites(folder: Path) -> tuple[HFModel, Sites, list[str]]:
    """The model, its hyper-connections as ours in fp32, and a report, a line a string.

    Raises:
        ConvertError: says which file or tensor is wrong.
    """
    model = read_model(folder)
    places, names, others = find_places(folder, model)
    wanted = names_of(model, names)
    if missing := [name for name in wanted if name not in places]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConvertError(
            f"{folder} lacks {missing[0]}{more}, of {model.layers} layers (config.json): download"
            " the rest"
        )
    sites = Sites({}, {})
    for name, (place, _) in wanted.items():
        value = read_tensor(places[name]).float()
        if isinstance(place, str):
            sites.head[place] = value
        else:
            sites.layers[place] = _other_rows(place[1], value, model.mhc.num_streams)
    dtypes = sorted({place.dtype for place in places.values()} - {"F32"})
    report = [
        f"{model.kind}: convention {model.mhc.convention_in_words}",
        f"{2 * model.layers} sites mapped, n*n rows of fn and base from [src, dst] to [dst, src]"
        + (f"; {', '.join(dtypes)} made F32" if dtypes else ""),
        *(["the learned head mapped: hc_head_*"] if sites.head else []),
        *([f"no counterpart: {', '.join(others)}"] if others else []),
        *(
            [f"no counterpart: Engram in front of layers {list(model.engram)}"]
            if model.engram
            else []
        ),
    ]
    return model, sites, report


def _other_rows(name: str, value: Tensor, n: int) -> Tensor:
    """phi and bias with their rows in the other order; alpha as it is."""
    return value if name.endswith(".alpha") else transpose_res_rows(value, n)


def as_hf(model: HFModel, sites: Sites, names: Names) -> dict[str, Tensor]:
    """Our parameters under the checkpoint's names, in fp32."""
    n = model.mhc.num_streams
    return {
        name: sites.head[place]
        if isinstance(place, str)
        else _other_rows(place[1], sites.layers[place], n).contiguous()
        for name, (place, _) in names_of(model, names).items()
    }


def model_of(mhc: MHCConfig, layers: int, width: int) -> HFModel:
    """The model that computes what these settings do.

    Raises:
        ConvertError: none does; says what each of them has.
    """
    for kind, convention in CONVENTIONS_OF.items():
        theirs = MHCConfig(
            num_streams=mhc.num_streams,
            sinkhorn_iterations=mhc.sinkhorn_iterations,
            convention=convention,
            norm_eps=mhc.norm_eps,
            pre_eps=mhc.pre_eps,
            sinkhorn_eps=mhc.pre_eps,
        )
        fields = ("variant", *CONVENTION_FIELDS)
        if mhc.pre_eps > 0 and all(getattr(mhc, f) == getattr(theirs, f) for f in fields):
            return HFModel(kind, mhc, layers, width)
    raise ConvertError(
        f"the checkpoint has variant {mhc.variant}, convention {mhc.convention_in_words}; of the"
        " models of Hugging Face, deepseek_v4 ends with a learned head, deepseek_v41 with the last"
        " H_pre of delayed sites, glm5_next with the mean, and all have one hc_eps above 0 for"
        " H_pre and Sinkhorn, the norm's eps inside the root, and columns first. A model trained"
        " with --mhc-convention deepseek_v4, deepseek_v4_1 or glm_5_3 can be written"
    )


def state_dict_of(folder: Path) -> tuple[MHCConfig, dict[str, Tensor]]:
    """For a mapping of one's own: the settings, and the parameters as a model with mHC has them.

    Args:
        folder: a Hugging Face checkpoint.

    Returns:
        What to give `with_mhc`, and fp32 tensors under the names of the model's `state_dict()`
        (`decoder.layers.0.attention_connection.phi`, ...), for `load_state_dict(..., strict=False)`
        of a model in one pipeline stage.

    Raises:
        ConvertError: says which file or tensor is wrong.
    """
    model, sites, _ = read_sites(folder)
    found = {f"decoder.layers.{i}.{name}": value for (i, name), value in sites.layers.items()}
    last = f"decoder.layers.{model.layers - 1}.head"
    return model.mhc, found | {f"{last}.{name}": value for name, value in sites.head.items()}
