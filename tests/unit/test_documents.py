"""README.md and docs/: what they name is there, and the README's program proves what it says."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import megatron_mhc

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FOLDERS = ("docs", "benchmarks", "examples")
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")),
]
SOURCES = [
    path
    for folder in ("megatron_mhc", "kernels", "patches")
    for path in (ROOT / folder).rglob("*.py")
]


@pytest.fixture(scope="module")
def settings_page() -> Any:
    """docs/tools/settings_page.py as a module; the folder is no package."""
    pytest.importorskip("megatron.core")
    path = ROOT / "docs" / "tools" / "settings_page.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_short_and_has_the_two_commands() -> None:
    lines = README.splitlines()
    assert len(lines) <= 110
    assert any(line.startswith("    make test ") for line in lines)  # what .ci/run runs
    assert any(line.startswith("    make train ") for line in lines)


def test_the_readmes_program_proves_what_it_says(tmp_path: Path) -> None:
    """In an empty folder, as a reader runs it. The models add in another order, in fp32."""
    pytest.importorskip("megatron.core")
    (program,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    assert len(program.splitlines()) <= 22
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # logits are up to 0.6: fp32 rounds them by 6e-8; other weights are 0.1 and more away
    distance = float(done.stdout.split()[-1])
    assert distance < 2e-6


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text)
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (path.parent / link).exists()]


def test_the_page_of_settings_is_what_the_code_has(settings_page: Any) -> None:
    """`python docs/tools/settings_page.py` writes it anew."""
    assert settings_page.PAGE.read_text() == settings_page.page()


def test_every_environment_variable_is_on_that_page(settings_page: Any) -> None:
    text = settings_page.page()
    source = "\n".join(path.read_text() for path in SOURCES)
    named = set(re.findall(r"\bMEGATRON_MHC_[A-Z_]+\b", source))
    named |= set(re.findall(r"environ(?:\.get|\.setdefault)?[\[(]\s*\"([A-Z_]+)\"", source))
    assert {"MEGATRON_MHC_PATCHES", "TRITON_INTERPRET"} <= named
    assert not [name for name in sorted(named) if f"`{name}`" not in text]
    assert {"doctor", "plot", "convert"} <= settings_page.commands().keys()


def test_tests_that_documents_name_are_there() -> None:
    files = [path for path in (ROOT / "tests").rglob("test_*.py")]
    functions = set(re.findall(r"def (test_\w+)", "\n".join(path.read_text() for path in files)))
    names = {path.name for path in files}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(path.read_text() for path in pages)
    paths = set(re.findall(r"`(tests/[\w/]+\.py)`", text))
    assert len(paths) > 5 and not [path for path in sorted(paths) if not (ROOT / path).is_file()]
    of_name = set(re.findall(r"`(?:[\w/]*/)?(test_\w+\.py)`", text))
    assert len(of_name) > 20 and not of_name - names
    of_function = set(re.findall(r"`(test_\w+)`", text))
    assert len(of_function) > 10 and not of_function - functions


def test_every_report_is_listed() -> None:
    results = ROOT / "benchmarks" / "results"
    listed = (results / "README.md").read_text()
    reports = [path for path in results.rglob("20*.md")]
    assert len(reports) > 10
    missing = [path.relative_to(results).as_posix() for path in reports]
    assert not [path for path in missing if f"]({path})" not in listed]


def test_the_version_stands_in_one_place() -> None:
    version = megatron_mhc.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    (newest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == version
    assert not re.search(r"^version = \"", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
