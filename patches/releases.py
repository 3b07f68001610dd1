"""The releases of Megatron-Core that the plugin works with, and what is wrong with others."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED = ">=0.18.2,<0.20"
"""The releases that pass the whole test suite (`make test-matrix`), and their bug-fix releases."""

REFUSED = {
    "0.17": "training scripts start in another way there, and interleaved pipelines with mHC"
    " train to other losses than one process",
    "0.16": "its package has no megatron.training, and its optimizer lacks hooks",
}
"""For each older series that was tried (0.17.1 and 0.16.1): why it does not work."""


class UnsupportedMegatronError(RuntimeError):
    """The installed Megatron-Core is none of the supported releases, or there is none."""


def megatron_core_version() -> str | None:
    """The installed Megatron-Core's version, None where there is none."""
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        return None


def is_installed(releases: str) -> bool:
    """Whether the installed Megatron-Core is one of these releases (`<0.19`, say)."""
    installed = megatron_core_version()
    return installed is not None and SpecifierSet(releases).contains(installed, prereleases=True)


def check_release() -> None:
    """Refuse a Megatron-Core that is not supported, before anything of it is imported.

    Raises:
        UnsupportedMegatronError: names the installed release, why it does not work, and what to do.
    """
    if is_installed(SUPPORTED):
        return
    installed = megatron_core_version()
    if installed is None:
        found = "is not installed"
    else:
        found = f"{installed} is not supported"
        reason = REFUSED.get("{0.major}.{0.minor}".format(Version(installed)))
        if reason is not None:
            found += f": {reason}"
    raise UnsupportedMegatronError(
        f"Megatron-Core {found}. megatron_mhc works with {SUPPORTED}:"
        f" pip install 'megatron-core{SUPPORTED}'"
    )
