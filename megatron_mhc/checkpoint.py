"""The settings of mHC in a checkpoint, and the check of them when it is loaded.

Every layer with sites keeps its settings as torch's extra state: every way to save a model stores
them, a flag or no flag, and every way to load one compares them. Before any tensor is loaded, a
distributed checkpoint is looked at (`check_load`), and so is a model's state dict (`check_state`):
else a wrong width would be the first error, and where one of the two has no mHC there is none.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .config import MHCConfig

FUNCTION_FIELDS = ("num_streams", "sinkhorn_iterations", "convention", "variant")
"""The fields of MHCConfig that give the same parameters another shape or another meaning.

The others may change from run to run: `init` is in the parameters by then, and backend, recompute
and overlap compute the same function.
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
    wrong = [name for name in given if stored.get(name) != given[name]]
    if wrong:
        values = ", ".join(
            f"{name} is {stored.get(name)} there and {given[name]} here" for name in wrong
        )
        flags = " ".join(_flag(name, stored.get(name)) for name in wrong)
        variables = " ".join(f"MHC_{name.upper()}={stored.get(name)}" for name in wrong)
        raise CheckpointSettingsError(
            f"{where} was saved with other settings of mHC: {values}. Give the checkpoint's:"
            f" {flags} (with --spec: {variables}), or load another checkpoint"
        )


def _flag(name: str, value: Any) -> str:
    return f"--mhc-{name.replace('_', '-')} {value}"


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
    if mine is None and stored is not None:
        layers = stored[: stored.index(SETTINGS_KEY)]
        if not any(key.startswith(layers) for key in asked):
            return  # something else than the model
    _check(None if stored is None else read(stored), mine, f"the checkpoint {checkpoint}")


def check_state(model: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Check a state dict against the model that is about to load all of it.

    Raises:
        CheckpointSettingsError: the settings differ, or one of the two has no mHC.
    """
    stored = next((value for key, value in state.items() if key.endswith(SETTINGS_KEY)), None)
    found = (m.get_extra_state() for m in model.modules() if isinstance(m, StoredSettings))
    _check(stored, next(found, None), "the checkpoint")


def _check(
    stored: Mapping[str, Any] | None, mine: Mapping[str, Any] | None, checkpoint: str
) -> None:
    """Compare the settings in a checkpoint with a model's; None for either without mHC."""
    if stored is not None and mine is not None:
        check_settings(stored, mine, checkpoint)
    elif mine is not None:
        raise CheckpointSettingsError(
            f"{checkpoint} has no mHC in it and the model has. To start from an ordinary model's"
            " checkpoint, convert it: python -m megatron_mhc convert SOURCE TARGET"
        )
    elif stored is not None:
        flags = " ".join(_flag(name, value) for name, value in stored.items())
        raise CheckpointSettingsError(
            f"{checkpoint} is of a model with mHC and this model has none: add --mhc {flags}, or"
            " load another checkpoint"
        )
