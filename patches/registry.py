"""The one way in which this project changes Megatron: named, versioned, undoable replacements."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .supported_versions import SUPPORTED, is_of, megatron_core_version

ENVIRONMENT_VARIABLE = "MEGATRON_MHC_PATCHES"
"""Turns single patches off: comma-separated ids with a minus in front, `-metrics,-throughput`."""


_INHERITED = object()
"""Stands for the original of an attribute that the patched object only inherits."""


class PatchError(RuntimeError):
    """A patch cannot be applied: names the patch, its target and the versions involved."""


@dataclass(frozen=True)
class Patch:
    """One replacement of one symbol.

    Attributes:
        id: short and unique; what `MEGATRON_MHC_PATCHES` and `doctor` call it.
        target: `package.module:attribute` (or `:Class.attribute`).
        replace: gets the original, returns what stands in its place.
        why: what it is for, a line for `doctor`.
        versions: the Megatron-Core versions for which it is known to be right.
        optional: a missing target is reported and not an error.
    """

    id: str
    target: str
    replace: Callable[[Any], Any]
    why: str
    versions: str = SUPPORTED
    optional: bool = False


@dataclass(frozen=True)
class PatchStatus:
    """What became of a patch: its state, and why where it is not applied."""

    patch: Patch
    state: Literal["applied", "off", "missing", "not asked for"]
    reason: str = ""


def turned_off() -> set[str]:
    """The ids that the environment variable turns off.

    Raises:
        PatchError: an entry that does not start with a minus.
    """
    entries = [e.strip() for e in os.environ.get(ENVIRONMENT_VARIABLE, "").split(",") if e.strip()]
    for entry in entries:
        if not entry.startswith("-"):
            raise PatchError(
                f"{ENVIRONMENT_VARIABLE} has the entry {entry!r}; expected ids with a minus in"
                " front, separated by commas, such as -metrics"
            )
    return {entry[1:] for entry in entries}


def locate(target: str) -> tuple[Any, str]:
    """The object that holds a target, and the attribute's name.

    Raises:
        ImportError, AttributeError: the module or the attribute is not there, or what should be a
            class is none (a function has an `__init__` too, which nobody calls).
    """
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
        if not isinstance(owner, type):
            raise AttributeError(f"{parent} in {module_name} is no class")
    getattr(owner, name)
    return owner, name


def is_there(target: str) -> bool:
    """Whether a Megatron that is supported has this: for what differs between its releases."""
    try:
        locate(target)
    except (ImportError, AttributeError):
        return False
    return True


class Registry:
    """Applies patches once, remembers what they displaced, and puts it back."""

    def __init__(self) -> None:
        self._applied: dict[str, tuple[Patch, Any, str, Any]] = {}

    def apply(self, *patches: Patch) -> None:
        """Apply patches in order; one that is applied already stays as it is.

        Raises:
            PatchError: the target is missing, or Megatron-Core's version is not one that the patch
                knows. The patches applied before it in this call are undone.
        """
        new: list[str] = []
        try:
            for patch in patches:
                if self._apply_one(patch):
                    new.append(patch.id)
        except PatchError:
            if new:
                self.undo(*new)
            raise

    def _apply_one(self, patch: Patch) -> bool:
        if patch.id in self._applied or patch.id in turned_off():
            return False
        installed = megatron_core_version()
        if not is_of(installed, patch.versions):
            raise PatchError(
                f"patch {patch.id!r} ({patch.why}) knows Megatron-Core {patch.versions}; installed"
                f" is {installed or 'none'}. Install one of these, or turn the patch off with"
                f" {ENVIRONMENT_VARIABLE}=-{patch.id}"
            )
        try:
            owner, name = locate(patch.target)
        except (ImportError, AttributeError) as error:
            if patch.optional:
                return False
            raise PatchError(
                f"patch {patch.id!r} ({patch.why}) did not find its target {patch.target} in"
                f" Megatron-Core {installed} (it knows {patch.versions}): {error}. Install one of"
                f" these anew, or turn the patch off with {ENVIRONMENT_VARIABLE}=-{patch.id}"
            ) from error
        self._put(patch, owner, name)
        return True

    def _put(self, patch: Patch, owner: Any, name: str) -> None:
        # vars() keeps a staticmethod or classmethod wrapped; getattr would unwrap it
        original = vars(owner).get(name, _INHERITED)
        held = getattr(owner, name) if original is _INHERITED else original
        setattr(owner, name, patch.replace(held))
        self._applied[patch.id] = (patch, owner, name, original)

    def undo(self, *ids: str) -> None:
        """Put the originals back: of these patches, in any order, or of all.

        A patch that stays and went around one of them goes around what is there now.
        """
        for patch_id in ids or tuple(reversed(self._applied)):
            if patch_id in self._applied:
                self._undo_one(patch_id)

    def _undo_one(self, patch_id: str) -> None:
        later = list(self._applied)[list(self._applied).index(patch_id) + 1 :]
        _, owner, name, original = self._applied.pop(patch_id)
        if original is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
        # what was put around it holds it still: it is made anew, in the same order
        for other in later:
            patch, its_owner, its_name, _ = self._applied[other]
            if its_owner is owner and its_name == name:
                del self._applied[other]
                self._put(patch, owner, name)

    def status(self, *patches: Patch) -> list[PatchStatus]:
        """What became of each of these patches."""
        return [self._status_of(patch) for patch in patches]

    def _status_of(self, patch: Patch) -> PatchStatus:
        if patch.id in self._applied:
            return PatchStatus(patch, "applied")
        if patch.id in turned_off():
            return PatchStatus(patch, "off", f"by {ENVIRONMENT_VARIABLE}")
        try:
            locate(patch.target)
        except (ImportError, AttributeError) as error:
            return PatchStatus(patch, "missing", str(error))
        return PatchStatus(patch, "not asked for")


registry = Registry()
"""The registry of this process."""
