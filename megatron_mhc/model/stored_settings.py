"""The settings of mHC in a checkpoint, and the check of them when it is loaded.

Every layer with sites keeps its settings as torch's extra state: every way to save a model stores
them, a flag or no flag, and every way to load one compares them. A distributed checkpoint is also
looked at before any of its tensors are (`check_load`): else a wrong width would be the first error;
and so is the state dict of every other one (`check_state_dict`): Megatron forgives what is missing.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from megatron_mhc.config import CONVENTION_FIELDS, CONVENTIONS, MHCConfig, as_flag

_FIELDS = ("num_streams", "sinkhorn_iterations", "variant")
FUNCTION_FIELDS = (
    "num_streams",
    "sinkhorn_iterations",
    "convention",
    "variant",
    *CONVENTION_FIELDS,
)
"""The fields of MHCConfig that give the same parameters another shape or another meaning.

The convention's name stands for its fields, which are compared: a checkpoint of a time when they
were not stored has the name alone. The fields that are not here may change from run to run: `init`
is in the parameters by then, and backend, recompute and overlap compute the same function.
"""

SETTINGS_KEY = "mhc_settings._extra_state"
"""How the key of a layer's settings ends in a state dict."""


class CheckpointSettingsError(ValueError):
    """A checkpoint belongs to a model with other settings of mHC, or without it."""


def function_settings(mhc: MHCConfig) -> dict[str, Any]:
    """What a checkpoint stores: the fields named in FUNCTION_FIELDS."""
    return {name: getattr(mhc, name) for name in FUNCTION_FIELDS}


def check_settings(stored: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    """Compare a checkpoint's settings with a model's.

    Args:
        stored, given: what `function_settings` returned for either.
        where: what to call the checkpoint in the message.

    Raises:
        CheckpointSettingsError: names every field that differs, both values and the flags to give.
    """
    stored, given = _whole(stored), _whole(given)
    wrong = [name for name in given if name != "convention" and stored.get(name) != given[name]]
    if not wrong:
        return
    to_give = {name: stored.get(name) for name in wrong}
    names = (stored.get("convention"), given.get("convention"))
    if names[0] != names[1] and set(wrong) - set(_FIELDS):  # the name says it in a word
        wrong = [name for name in wrong if name in _FIELDS] + ["convention"]
        to_give = {name: stored.get(name) for name in wrong} | _overrides(stored)
        wrong += [name for name in CONVENTION_FIELDS if name in to_give]
    values = ", ".join(
        f"{name} is {stored.get(name)} there and {given.get(name)} here" for name in wrong
    )
    to_give = {name: value for name, value in to_give.items() if value is not None}
    variables = " ".join(f"MHC_{name.upper()}={value}" for name, value in to_give.items())
    raise CheckpointSettingsError(
        f"{where} was saved with other settings of mHC: {values}. Give the checkpoint's:"
        f" {_flags(to_give)} (with --spec: {variables}), or load another checkpoint"
    )


def _preset(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the convention's name stands for; none of a name that is not known here."""
    preset = CONVENTIONS.get(str(settings.get("convention")))
    return {} if preset is None else preset._asdict()


def _whole(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with all fields of their convention, which older checkpoints do not have."""
    return {**_preset(settings), **settings}


def _overrides(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the convention that its name does not say; without a head it has no eps."""
    preset, whole = _preset(settings), _whole(settings)
    if whole.get("end") != "head":
        preset["head_eps"] = None
    return {n: whole[n] for n in CONVENTION_FIELDS if n in whole and whole[n] != preset.get(n)}


def _flags(settings: Mapping[str, Any]) -> str:
    return " ".join(filter(None, map(as_flag, settings, settings.values())))


class StoredSettings(torch.nn.Module):
    """Keeps a layer's settings in its state dict, and compares them when one is loaded."""

    def __init__(self, mhc: MHCConfig) -> None:
        super().__init__()
        self._settings = function_settings(mhc)

    def get_extra_state(self) -> dict[str, Any]:
        """What torch saves for this module."""
        return dict(self._settings)

    def set_extra_state(self, state: Any) -> None:
        """What torch calls with the saved settings.

        Raises:
            CheckpointSettingsError: they are others.
        """
        check_settings(state, self._settings, "the checkpoint")


def check_load(
    asked: Mapping[str, Any],
    stored_keys: Iterable[str],
    read: Callable[[str], Any],
    checkpoint: str,
) -> None:
    """Check a distributed checkpoint against the model that is about to load it.

    Args:
        asked: what the model asks for, by the checkpoint's keys; settings with their value.
        stored_keys: what the checkpoint has; an object's key ends in `/shard_...`.
        read: returns the object of such a key.
        checkpoint: its folder, for the message.

    Raises:
        CheckpointSettingsError: the settings differ, or one of the two has no mHC.
    """
    stored = next((key for key in stored_keys if f"{SETTINGS_KEY}/" in key), None)
    mine = next((value for key, value in asked.items() if key.endswith(SETTINGS_KEY)), None)
    if stored is None:
        _check(None, mine, checkpoint)
    elif mine is not None or _is_of(stored, asked):
        _check(read(stored), mine, checkpoint)


def refuse_gpt(chunks: Iterable[torch.nn.Module]) -> None:
    """Refuse a GPT's checkpoint for a HybridModel with mHC, which Megatron would read as it is.

    Raises:
        CheckpointSettingsError: the model has mHC.
    """
    modules = (module for chunk in chunks for module in chunk.modules())
    if any(isinstance(module, StoredSettings) for module in modules):
        raise CheckpointSettingsError(
            "the checkpoint is a GPT's and the model a HybridModel with mHC: convert it (python -m"
            " megatron_mhc convert SOURCE TARGET --hybrid-layer-pattern PATTERN; an ordinary GPT's"
            " to a start with mHC first), and load the new one"
        )


def check_state_dict(chunk: torch.nn.Module, state: Mapping[str, Any], checkpoint: str) -> None:
    """Check a chunk's state dict against the chunk of a model that is about to load it.

    Args:
        chunk: without the wrappers of data parallelism and bf16.
        state: what the checkpoint has for it.
        checkpoint: its file, for the message.

    Raises:
        CheckpointSettingsError: the settings differ, or one of the two has no mHC.
    """
    stored = next((key for key in state if key.endswith(SETTINGS_KEY)), None)
    own = (module for module in chunk.modules() if isinstance(module, StoredSettings))
    mine = next((module.get_extra_state() for module in own), None)
    if stored is None:
        _check(None, mine, checkpoint)
    elif mine is not None or _is_of(stored, dict(chunk.named_parameters())):
        _check(state[stored], mine, checkpoint)


def _is_of(stored: str, names: Iterable[str]) -> bool:
    """Whether the settings under this key are of a model that has layers by these names."""
    layers = stored[: stored.index(SETTINGS_KEY)]
    return any(name.startswith(layers) for name in names)


def _check(stored: Mapping[str, Any] | None, mine: Mapping[str, Any] | None, where: str) -> None:
    """Compare a checkpoint's settings with a model's; None is one without mHC."""
    where = f"the checkpoint {where}"
    if stored is not None and mine is not None:
        check_settings(stored, mine, where)
    elif mine is not None:
        raise CheckpointSettingsError(
            f"{where} has no mHC in it and the model has. To start from an ordinary model's"
            " checkpoint, convert it: python -m megatron_mhc convert SOURCE TARGET (from the legacy"
            " format to torch_dist first, with Megatron's --ckpt-convert-format torch_dist)"
        )
    elif stored is not None:
        named = {n: v for n, v in stored.items() if n not in CONVENTION_FIELDS}
        flags = _flags(named | _overrides(stored))
        raise CheckpointSettingsError(
            f"{where} is of a model with mHC and this model has none: add --mhc {flags}, or load"
            " another checkpoint"
        )
