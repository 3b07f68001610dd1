"""Megatron's own mHC in a checkpoint: whose of its generations it is, and its parameters as ours.

Three generations have the same keys and shapes. Main of August 2026 stores the n*n rows of a site
[dst, src], as we do; dev, and main from September 2026 on, store them [src, dst].
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.config import CONVENTION_FIELDS, CONVENTIONS, MHCConfig
from megatron_mhc.kernels.reference import transpose_res_rows

from .new_checkpoint import ConvertError
from .site_items import HEAD, LAYERS, Sites

AUGUST, DEV = "megatron_main_2026_08", "megatron_dev"
NAMES = {
    "attention_connection": "self_attention_hyper_connection",
    "mlp_connection": "mlp_hyper_connection",
}
"""Our name of a layer's site, and Megatron's."""
ALPHAS = ("alpha_pre", "alpha_post", "alpha_res")
PARAMETERS = ("mapping_proj.weight", "bias", *ALPHAS)
HEAD_KEYS = {name: f"decoder.hc_head_{name}" for name in HEAD}
_OTHERS = {"mhc_single_pass": False, "mhc_norm_eps_inside_sqrt": False, "mhc_epsilon": 1e-6}
"""Arguments of proposals and derivatives of Megatron, and the value with which nothing changes."""
_BOTH = (
    "give --mhc-convention megatron_main_2026_08 for Megatron's main from 17 August 2026 to a day"
    " before 8 September, --mhc-convention megatron_dev --mhc-end mean for its main after that, or"
    " --mhc-convention megatron_dev for its dev branch"
)


def is_native(key: str) -> bool:
    """Whether an item is one that Megatron's own mHC has added to a GPT."""
    return key in HEAD_KEYS.values() or (
        key.startswith(LAYERS) and any(f".{name}." in key for name in NAMES.values())
    )


def check_native(folder: Any, keys: Mapping[str, Any], args: Any) -> None:
    """Whether these are the keys of a GPT with Megatron's own mHC, all of which has a counterpart.

    Raises:
        ConvertError: of which model else they are, or what has none.
    """
    if any(key.startswith(LAYERS) and ".hyper_connection." in key for key in keys):
        raise ConvertError(
            f"{folder} is of a HybridModel, whose layers have one site each under other keys:"
            " --from megatron takes GPT models"
        )
    if not any(map(is_native, keys)):
        raise ConvertError(
            f"{folder} has nothing of Megatron's own mHC"
            f" ({LAYERS}self_attention_hyper_connection...): an ordinary model's checkpoint is"
            " converted without --from"
        )
    for key in keys:
        if key.startswith("mtp."):
            raise ConvertError(
                f"{folder} has layers for multi-token prediction ({key}), which read the streams"
                " there before they are one; ours read the one stream, another function: convert a"
                " model without them (no --mtp-num-layers)"
            )
    for name, plain in _OTHERS.items():
        if (value := getattr(args, name, plain)) != plain:
            raise ConvertError(
                f"{folder} was trained with --{name.replace('_', '-')} ({value}), which none of the"
                " Megatrons known here has: what it computes is not known, so it cannot be"
                " converted"
            )


def epsilon_of(args: Any) -> float | None:
    """The eps of a model's norms, which dev's learned head has too; None if nothing says it."""
    found: float | None = getattr(args, "layernorm_epsilon", getattr(args, "norm_epsilon", None))
    return found


def _said(keys: Mapping[str, Any], args: Any) -> tuple[dict[str, Any], str]:
    """What a checkpoint says of its convention, and where."""
    epsilon = epsilon_of(args)
    if HEAD_KEYS["fn"] in keys:
        said = {"convention": DEV, "end": "head"} | (
            {} if epsilon is None else {"head_eps": epsilon}
        )
        return said, f"it has {HEAD_KEYS['fn']}"
    if getattr(args, "enable_mhc_connections", False):
        late = [name for name in ("use_fused_mhc", "mhc_fused_backend") if hasattr(args, name)]
        if late:
            return {"convention": DEV, "end": "mean"}, f"its arguments have {late[0]}"
        return {
            "convention": AUGUST
        }, "its arguments have enable_mhc_connections, not use_fused_mhc"
    return {}, ""


def settings(
    folder: Any, keys: Mapping[str, Any], args: Any, given: Mapping[str, Any], streams: int
) -> tuple[MHCConfig, str]:
    """Our settings for a checkpoint with Megatron's own mHC, and what tells its generation.

    Args:
        folder: what to call it in a message.
        keys: its items.
        args: Megatron's arguments in it, or None.
        given: fields of MHCConfig from the command line: they fill in what it does not say.
        streams: n of its tensors.

    Raises:
        ConvertError: it does not say whose it is, or says another thing than was given.
    """
    said, where = _said(keys, args)
    if not said and given.get("convention") not in (AUGUST, DEV):
        raise ConvertError(
            f"{folder} does not say which of Megatron's own mHC it has (no arguments in it that do,"
            f" no decoder.hc_head_fn), and they store the same keys with other meanings: {_BOTH}"
        )
    said |= {"num_streams": streams}
    if (iterations := getattr(args, "mhc_sinkhorn_iterations", None)) is not None:
        said["sinkhorn_iterations"] = iterations
    elif "sinkhorn_iterations" not in given:
        raise ConvertError(
            f"{folder} does not say how many Sinkhorn iterations it has: give"
            " --mhc-sinkhorn-iterations (Megatron's default is 20)"
        )
    wrong = [name for name in said if name in given and given[name] != said[name]]
    if wrong:
        raise ConvertError(
            f"{folder}: "
            + ", ".join(f"{n} is {said[n]} there and {given[n]} was given" for n in wrong)
            + (f" ({where})" if where else "")
            + ": drop the flag"
        )
    try:
        return MHCConfig(**{**said, **given}), where or "it was given"
    except ValueError as error:
        raise ConvertError(str(error)) from error


def generation(mhc: MHCConfig) -> str:
    """Which of Megatron's own computes what these settings do: AUGUST or DEV.

    Raises:
        ConvertError: none does; names the fields that differ from either.
    """
    mine = {name: getattr(mhc, name) for name in CONVENTION_FIELDS}
    differ = {}
    for name in (AUGUST, DEV):
        theirs = CONVENTIONS[name]._asdict()
        free = {"end", "head_eps"} if name == DEV and mhc.end in ("mean", "head") else {"head_eps"}
        differ[name] = [f for f in mine if f not in free and mine[f] != theirs[f]]
        if mhc.variant == "mhc" and not differ[name]:
            return name
    raise ConvertError(
        f"the checkpoint has variant {mhc.variant}, convention {mhc.convention_in_words}, which no"
        " mHC of Megatron's own computes: "
        + "; ".join(
            f"{name} differs in {', '.join(f'{f} ({CONVENTIONS[name]._asdict()[f]})' for f in d)}"
            for name, d in differ.items()
        )
        + ". Models that are trained with one of these two conventions can go back"
    )


def as_ours(values: Mapping[tuple[int, str], Tensor], which: str, n: int) -> dict[Any, Tensor]:
    """Megatron's parameters of the sites, in the dtype that they have, as ours in fp32."""
    found: dict[Any, Tensor] = {}
    for layer in sorted({layer for layer, _ in values}):
        for ours, native in NAMES.items():
            part = {name: values[layer, f"{native}.{name}"].float() for name in PARAMETERS}
            phi, bias = part["mapping_proj.weight"], part["bias"]
            if which == DEV:
                phi, bias = transpose_res_rows(phi, n), transpose_res_rows(bias, n)
            alpha = torch.cat([part[name] for name in ALPHAS])
            own = {"phi": phi, "alpha": alpha, "bias": bias}
            found |= {(layer, f"{ours}.{name}"): value for name, value in own.items()}
    return found


def as_native(sites: Sites, which: str, n: int, dtype: torch.dtype) -> dict[Any, Tensor]:
    """Our parameters of the sites as Megatron's, in this dtype."""
    found = {}
    for layer in sorted({layer for layer, _ in sites.layers}):
        for ours, native in NAMES.items():
            phi, alpha, bias = (
                sites.layers[layer, f"{ours}.{n}"] for n in ("phi", "alpha", "bias")
            )
            if which == DEV:
                phi, bias = transpose_res_rows(phi, n), transpose_res_rows(bias, n)
            parts = (phi, bias, *alpha.split(1))
            for name, value in zip(PARAMETERS, parts, strict=True):
                found[layer, f"{native}.{name}"] = value.to(dtype)
    return found


def native_arguments(mhc: MHCConfig, which: str) -> dict[str, Any]:
    """Megatron's arguments for its own mHC with these settings."""
    own = {"mhc_sinkhorn_iterations": mhc.sinkhorn_iterations}
    if which == DEV and mhc.learned_head:
        return own | {"enable_hyper_connections": True, "num_residual_streams": mhc.num_streams}
    own |= {"enable_mhc_connections": True, "mhc_num_residual_streams": mhc.num_streams}
    return own | ({"use_fused_mhc": False} if which == DEV else {})


def without_ours(args: Any) -> None:
    """Take what mHC has added to Megatron's arguments away again."""
    for name in ("mhc", *(f"mhc_{field}" for field in asdict(MHCConfig()))):
        if hasattr(args, name):
            delattr(args, name)
    if hasattr(args, "mhc_base_spec"):
        args.spec = args.mhc_base_spec
        del args.mhc_base_spec


def without_native(args: Any) -> None:
    """Turn Megatron's own mHC off in its arguments, and its spec, which builds that."""
    args.mhc_base_spec = None
    for name in (
        *("enable_mhc_connections", "enable_hyper_connections", "mhc_num_residual_streams"),
        *("num_residual_streams", "use_fused_mhc", "mhc_fused_backend", "mhc_init_gating_factor"),
        "mhc_recompute_layer_num",
    ):
        if hasattr(args, name):
            delattr(args, name)
