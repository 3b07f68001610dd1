"""What long tools show of their progress: on standard error, so that pipes stay clean."""

import os
import sys
from typing import Any

from tqdm import tqdm

SECONDS = 10.0
"""Between two lines where standard error is no terminal, but for the first and the last."""
PLAIN = "{desc}: {n_fmt} of {total_fmt}{unit} [{elapsed}<{remaining}, {rate_fmt}]"


class _Lines:
    """A file for tqdm: each state becomes a line of its own, not one that is written over."""

    def write(self, text: str) -> None:
        if state := text.strip():  # a carriage return in front, or alone at the end
            print(state, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Every line is flushed as it is written."""


def progress(what: str, total: int, unit: str, seconds: float = SECONDS) -> Any:
    """A tqdm of so many units, for a `with` statement; `update(n)` says that n more are done.

    One line that rewrites itself where standard error is a terminal. Elsewhere, in a job's log, a
    plain line at the start, one at the end, and one when so many seconds have passed.

    Args:
        what: the tool and what it does, `convert: copying`.
        total: how many there are.
        unit: of what; "B" is counted in KiB, MiB, GiB.
        seconds: between plain lines.
    """
    is_bytes = unit == "B"
    more: dict[str, Any] = {"unit_scale": True, "unit_divisor": 1024} if is_bytes else {}
    if not sys.stderr.isatty():
        more |= {"file": _Lines(), "mininterval": seconds, "miniters": 1, "bar_format": PLAIN}
    elif not os.get_terminal_size(sys.stderr.fileno()).columns:
        # a terminal that does not know its size, in which tqdm would draw nothing
        more |= {"ncols": 80, "nrows": 24}
    return tqdm(total=total, desc=what, unit=unit if is_bytes else f" {unit}", **more)
