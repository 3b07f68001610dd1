"""The folder of a checkpoint that `convert` makes: there when it is whole, or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""Megatron's name for a checkpoint without a past: it starts at iteration 0, without optimizer."""

ANOTHER = "copy it again from where it was saved, or give the folder of an earlier iteration"
"""What to do about a checkpoint that is not whole."""


class ConvertError(ValueError):
    """The source is no checkpoint that can be converted, or the target is there already."""


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into; the target appears when it is whole, or not at all.

    Raises:
        ConvertError: the target is there already.
    """
    if target.exists():
        raise ConvertError(f"{target} is there already: name a new folder, or remove it")
    made_for_it = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's is for its owner alone
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        for parent in made_for_it:
            with contextlib.suppress(OSError):  # somebody else put something there
                parent.rmdir()
        raise


@contextlib.contextmanager
def new_checkpoint(target: Path) -> Iterator[Path]:
    """The folder of a release to write into, in a new folder.

    Raises:
        ConvertError: the target is there already.
    """
    with new_folder(target) as unfinished:
        (unfinished / RELEASE).mkdir()
        yield unfinished / RELEASE
        (unfinished / TRACKER).write_text(RELEASE)
