"""The releases of Megatron-Core that the plugin works with, and what is wrong with others.

What counts is the module that an import finds: a checkout on PYTHONPATH comes before what pip has
installed, and nothing but its own files says so.
"""

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED = ">=0.18.2,<0.21"
"""The releases that pass the whole test suite (`make test-matrix`, `make test-main`), and their
bug-fix releases."""

REFUSED = {
    "0.17": "training scripts start in another way there, and interleaved pipelines with mHC"
    " train to other losses than one process",
    "0.16": "its package has no megatron.training, and its optimizer lacks hooks",
}
"""For each older series that was tried (0.17.1 and 0.16.1): why it does not work."""

_PART = re.compile(r"""^(MAJOR|MINOR|PATCH|PRE_RELEASE) = ['"]?(\w*)['"]?$""", re.MULTILINE)


class UnsupportedMegatronError(RuntimeError):
    """The Megatron-Core found is none of the supported releases, or there is none."""


def megatron_core_folder() -> Path | None:
    """The folder that `import megatron.core` takes, or has taken; None where there is none.

    Nothing of it is imported by this.
    """
    try:
        found = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:  # nor any `megatron`
        return None
    return None if found is None or found.origin is None else Path(found.origin).parent


def megatron_core_version() -> str | None:
    """The version that the Megatron-Core in `megatron_core_folder` says it is, None without one.

    Raises:
        UnsupportedMegatronError: it does not say.
    """
    folder = megatron_core_folder()
    if folder is None:
        return None
    # read and not run: in a clone it asks git, which adds a commit to the version
    file = folder / "package_info.py"
    parts = dict(_PART.findall(file.read_text())) if file.is_file() else {}
    if not {"MAJOR", "MINOR", "PATCH"} <= parts.keys():
        raise UnsupportedMegatronError(
            f"Megatron-Core in {folder} does not say its version ({file} has no MAJOR, MINOR and"
            f" PATCH): install it anew, pip install 'megatron-core{SUPPORTED}'"
        )
    return "{MAJOR}.{MINOR}.{PATCH}{PRE_RELEASE}".format(**{"PRE_RELEASE": "", **parts})


def distribution_version() -> str | None:
    """The version of the distribution that pip has installed, None where there is none."""
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        return None


def is_of(found: str | None, releases: str) -> bool:
    """Whether this version is one of these releases; a pre-release counts as its release."""
    return found is not None and SpecifierSet(releases).contains(Version(found).base_version)


def is_installed(releases: str) -> bool:
    """Whether the Megatron-Core that an import finds is one of these releases (`<0.19`, say)."""
    return is_of(megatron_core_version(), releases)


def check_release() -> None:
    """Refuse a Megatron-Core that is not supported, before anything of it is imported.

    Raises:
        UnsupportedMegatronError: names the release and where it is, why it does not work, and what
            to do.
    """
    found = megatron_core_version()
    if is_of(found, SUPPORTED):
        return
    if found is None:
        problem = "is not installed"
    else:
        problem = f"{found} is not supported"
        reason = REFUSED.get("{0.major}.{0.minor}".format(Version(found)))
        if reason is not None:
            problem += f": {reason}"
        problem += f". It is in {megatron_core_folder()}"
        installed = distribution_version()
        if installed is not None and Version(installed) != Version(found):
            problem += f", which Python finds before the {installed} that is installed"
    raise UnsupportedMegatronError(
        f"Megatron-Core {problem}. megatron_mhc works with {SUPPORTED}:"
        f" pip install 'megatron-core{SUPPORTED}'"
    )
