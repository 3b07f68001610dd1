"""The example's package `study`, importable: `examples/` is no package of the project."""

import importlib
import sys
from types import ModuleType

from tests.megatron.common.launch import ROOT

FOLDER = ROOT / "examples" / "stability"


def module(name: str) -> ModuleType:
    """A module of examples/stability."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
