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
ROOTS = {"kernels": "megatron_mhc.kernels", "patches": "megatron_mhc.patches"}
# what `pip install -e` adds to Python's search; without it this is `pip install .`
NOT_EDITABLE = """
import sys
import tomllib
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
"""


ROOT = FOLDER.parent
# a folder may use those behind it, and the doors (config) that all of them share
ARROWS = {
    "doors": {"start", "tools", "model", "patches", "kernels", "config"},
    "tools": {"start", "metrics", "model", "costs", "patches", "kernels", "config"},
    "start": {"metrics", "pipeline", "model", "costs", "patches", "kernels", "config"},
    "metrics": {"model", "patches", "kernels", "config"},
    "pipeline": {"model", "kernels", "config"},
    "model": {"costs", "patches", "kernels", "config"},
    "costs": {"config"},
    "config": {"kernels"},
    "patches": set(),
    "kernels": set(),
}


def modules() -> dict[str, Path]:
    """The file of each module, by its whole name."""
    found = {}
    for folder, package in {**ROOTS, "megatron_mhc": "megatron_mhc"}.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that this one imports anywhere."""
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import module` needs the module; `from module import name` the module
            found |= {f"{module}.{alias.name}" for alias in node.names} & known.keys() or {module}
    return found & known.keys() - {name}


def folder_of(module: str) -> str:
    """The folder that a module is in; `config` is a place of its own."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or module.split(".")[-1] in ARROWS else "doors"


def test_folders_use_each_other_in_one_direction() -> None:
    known = modules()
    wrong = [
        f"{name} -> {other}"
        for name, path in known.items()
        for other in imported(name, path, known)
        if other != "megatron_mhc"
        and folder_of(other) != folder_of(name)
        and folder_of(other) not in ARROWS[folder_of(name)]
    ]
    assert not wrong, wrong
    TopologicalSorter(ARROWS).prepare()  # a CycleError names the folders of a cycle


def test_modules_import_each_other_in_one_direction() -> None:
    known = modules()
    # without the package itself, which offers `spec.with_mhc` on first use
    needs = {
        name: imported(name, path, known) - {"megatron_mhc"}
        for name, path in known.items()
        if name != "megatron_mhc"
    }
    assert "megatron_mhc.model.layer" in needs["megatron_mhc.model.specs"]
    assert (
        "megatron_mhc.kernels.triton.device"
        in needs["megatron_mhc.kernels.triton.passes.coefficients"]
    )
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
    found = {
        ".".join((package, *path.parent.relative_to(root / folder).parts))
        for folder, package in {"megatron_mhc": "megatron_mhc", **ROOTS}.items()
        for path in (root / folder).rglob("__init__.py")
    }
    assert found == set(listed)
