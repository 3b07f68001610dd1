"""No module of ours needs itself, imports inside functions counted."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import megatron_mhc

FOLDER = Path(megatron_mhc.__file__).parent


def imported(module: Path) -> set[str]:
    """The modules of the same package that this one imports anywhere."""
    nodes = ast.walk(ast.parse(module.read_text()))
    ours = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1]
    named = {node.module for node in ours if node.module is not None}
    return named | {alias.name for node in ours if node.module is None for alias in node.names}


def test_modules_import_each_other_in_one_direction() -> None:
    # without the package itself, which offers `spec.with_mhc` on first use
    needs = {path.stem: imported(path) for path in FOLDER.glob("[a-z]*.py")}
    assert "layer" in needs["wide"] and "accounting" in needs["activate"]
    TopologicalSorter(needs).prepare()  # a CycleError names the modules of a cycle
