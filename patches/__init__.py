"""Everything that this project changes in Megatron, through one registry."""

from .registry import Patch, PatchError, PatchStatus, Registry, registry

__all__ = ["Patch", "PatchError", "PatchStatus", "Registry", "registry"]
