"""MkDocs' hooks: the repository's own pages become pages of the site, and links to them lead there.

MkDocs knows docs/ alone. Reports, CONTRIBUTING.md and the like stand elsewhere, are read in the
repository too, and keep their links relative to where they stand.
"""

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "build" / "docs-sources"
"""The packages as they are installed, for the API's pages: mkdocs.yml names it."""
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def site_path(path: str) -> str | None:
    """Where a file of the repository stands on the site; None where it does not."""
    single = {
        "CONTRIBUTING.md": "contributing.md",
        "CHANGELOG.md": "changelog.md",
        "benchmarks/README.md": "benchmarks.md",
        "README.md": "index.md",
    }
    if path in single:
        return single[path]
    for folder, name in {
        "docs/": "",
        "benchmarks/results/": "reports/",
        "examples/stability/": "stability/",
    }.items():
        if path.startswith(folder) and path.endswith((".md", ".png")):
            inside = path.removeprefix(folder)
            return posixpath.join(name, re.sub(r"\bREADME\.md$", "index.md", inside))
    return None


def repository_path(uri: str) -> str:
    """The file of the repository that a page of the site is made of."""
    return PAGES.get(uri, f"docs/{uri}")


def _outside_docs() -> dict[str, str]:
    found = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
    for folder in ("benchmarks/results", "examples/stability"):
        found += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".md", ".png")]
    paths = [path.relative_to(ROOT).as_posix() for path in found if path.is_file()]
    return {site: path for path in paths if (site := site_path(path))}


PAGES = _outside_docs()


def on_startup(**_: Any) -> None:
    """Lay kernels/ and patches/ into the package, as an installation does."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    package = SOURCES / "megatron_mhc"
    shutil.copytree(ROOT / "megatron_mhc", package)
    for name in ("kernels", "patches"):
        shutil.copytree(ROOT / name, package / name)


def on_files(files: Any, config: Any) -> Any:
    """Add what stands outside docs/."""
    for uri, path in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point relative links at the site's pages. MkDocs reports those that lead nowhere.

    Reports have wide tables, which the column of contents would cut.
    """
    if page.file.src_uri.startswith(("reports/", "stability/")):
        page.meta.setdefault("hide", ["toc"])
    here = posixpath.dirname(repository_path(page.file.src_uri))
    from_uri = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        if "://" in link[2]:
            return link[0]
        target = site_path(posixpath.normpath(posixpath.join(here, link[2])))
        if target is None:
            return link[0]
        return f"{link[1]}{posixpath.relpath(target, from_uri or '.')}{link[3] or ''}{link[4]}"

    return LINK.sub(moved, markdown)
