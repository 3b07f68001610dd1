"""No module of ours needs itself, imports inside functions counted."""

import ast
import os
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import megatron_mhc

FOLDER = Path(megatron_mhc.__file__).parent
# what `pip install -e` adds to Python's search; without it this is `pip install .`
NOT_EDITABLE = """
import sys
import tomllib
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
"""


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


def test_a_checkout_works_whatever_is_installed() -> None:
    """Its folder `megatron_mhc` hides an installed package, which kernels/ and patches/ are in."""
    program = NOT_EDITABLE + "import megatron_mhc.kernels, megatron_mhc.patches as p; print(p)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    root = FOLDER.parent
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert str(root / "patches") in run.stdout


def test_every_folder_of_the_packages_is_installed() -> None:
    """A wheel without one would import nowhere but in a checkout."""
    root = FOLDER.parent
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    roots = {"megatron_mhc": "megatron_mhc", "kernels": "megatron_mhc.kernels"}
    roots["patches"] = "megatron_mhc.patches"
    found = {
        ".".join((package, *path.parent.relative_to(root / folder).parts))
        for folder, package in roots.items()
        for path in (root / folder).rglob("__init__.py")
    }
    assert found == set(listed)
