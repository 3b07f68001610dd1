"""A Megatron-Core that Python finds before the other one: the same files, but for some."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_mhc.patches.supported_versions import megatron_core_folder


def altered(folder: Path, **changes: Callable[[str], str]) -> dict[str, str]:
    """Put a Megatron into `folder`; the environment in which Python finds it first.

    Args:
        folder: an empty one.
        changes: for a file (`core__package_info` is core/package_info.py), from its text to what
            stands there instead. All others are links to the installed ones.
    """
    installed = megatron_core_folder()
    assert installed is not None
    # with what Python has compiled, which is as good for a link
    shutil.copytree(installed.parent, folder / "megatron", copy_function=os.symlink)
    for name, change in changes.items():
        file = folder / "megatron" / (name.replace("__", "/") + ".py")
        text = file.read_text()
        file.unlink()
        file.write_text(change(text))
    return {"PYTHONPATH": str(folder)}


def with_release(release: str) -> dict[str, Callable[[str], str]]:
    """A change for `altered`: Megatron says that it is this release."""
    parts = dict(zip(("MAJOR", "MINOR", "PATCH"), release.split("."), strict=True))

    def change(text: str) -> str:
        for name, value in parts.items():
            text, changed = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.M)
            assert changed == 1
        return text

    return {"core__package_info": change}


def with_flag(flag: str, arguments: str) -> dict[str, Callable[[str], str]]:
    """A change for `altered`: Megatron's parser has this flag, with add_argument's `arguments`."""
    more = f"""
def _with_flag(original):
    def add_megatron_arguments(parser):
        parser = original(parser)
        if {flag!r} not in parser._option_string_actions:
            parser.add_argument({flag!r}, {arguments})
        return parser
    return add_megatron_arguments


add_megatron_arguments = _with_flag(add_megatron_arguments)
"""
    return {"training__arguments": lambda text: text + more}
