"""A training run that is killed in the middle of a save, and what is left of it.

As a script it is the GPT example, whose process kills itself (SIGKILL) in its second save, with
some of the checkpoint's items in the file and others not.
"""

import functools
import os
import re
import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = "tests/megatron/common/kill_in_save.py"
EXAMPLE = "examples/pretrain_gpt.py"
SAVE, ITEMS = 2, 5
"""Which save does not end, and after how many of its items."""


def check_a_kill_in_mid_save(
    run: Callable[..., tuple[int, str]], folder: Path
) -> tuple[list[str], list[str]]:
    """Train seven iterations, saving after each third; once whole, once killed and resumed.

    Args:
        run: `run(script, *flags)` trains, and returns the exit status and what was printed.
        folder: where checkpoints go.

    Returns:
        The losses of iterations 4, 6 and 7: of the whole run, and of the resumed one.

    Raises:
        AssertionError: the run was not killed in mid-save, or did not resume from iteration 3.
    """

    def train(script: str, name: str, *flags: str) -> tuple[int, list[str], str]:
        save = ("--train-iters", "7", "--save", str(folder / name), "--save-interval", "3")
        status, printed = run(script, *save, *flags)
        return status, re.findall(r"iteration +\d+/.*lm loss: (\S+)", printed), printed

    status, whole, printed = train(EXAMPLE, "whole")
    assert status == 0 and len(whole) == 7, printed[-3000:]

    status, losses, printed = train(SCRIPT, "killed")
    assert status == -signal.SIGKILL and losses == whole[:6], printed[-3000:]
    tracker = folder / "killed" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "3"
    left = {file.name for file in (folder / "killed" / "iter_0000006").iterdir()}
    assert left and ".metadata" not in left, left

    status, resumed, printed = train(EXAMPLE, "killed", "--load", str(folder / "killed"))
    assert status == 0 and len(resumed) == 4, printed[-3000:]
    assert f"from {folder / 'killed'}" in printed and "at iteration 3" in printed

    # what the killed save left is overwritten: the checkpoint of iteration 6 is whole now
    tracker.write_text("6")
    status, last, printed = train(EXAMPLE, "killed", "--load", str(folder / "killed"))
    assert status == 0 and last == resumed[-1:], printed[-3000:]
    # the second loss that Megatron logs after a start is the mean of the first two
    return [whole[3], *whole[5:]], [resumed[0], *resumed[2:]]


def _arm() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async as files
    from megatron.training import training

    saves = items = 0
    save, write = training.save_checkpoint, files._write_item

    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        nonlocal saves
        saves += 1
        return save(*args, **kwargs)

    @functools.wraps(write)  # its caller reads the signature
    def write_item(*args: Any, **kwargs: Any) -> Any:
        nonlocal items
        items += saves == SAVE
        if items > ITEMS:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args, **kwargs)

    training.save_checkpoint, files._write_item = save_checkpoint, write_item


if __name__ == "__main__":
    _arm()
    runpy.run_path(EXAMPLE, run_name="__main__")
