"""A limit on waiting for other ranks, where the wait itself cannot be interrupted."""

import os
import sys
import threading
from typing import Self

VARIABLE = "MEGATRON_MHC_CONNECT_SECONDS"
"""The environment variable with the limit in seconds."""
DEFAULT_SECONDS = 300.0


def connect_seconds() -> float:
    """The limit in seconds.

    Raises:
        ValueError: the environment variable is no positive number.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text) if text else DEFAULT_SECONDS
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{VARIABLE} is {text!r}; expected a number of seconds, above 0")
    return seconds


class Deadline:
    """Ends the process with a sentence if the `with` block takes too long.

    A rank that waits for another inside NCCL or a store hears no exception, so a thread watches it;
    the launcher then ends the other ranks.

    Args:
        who: what to call this process in the sentence.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._for = ""
        self._seconds = connect_seconds()
        self._done = threading.Event()

    def waits_for(self, what: str) -> None:
        """Say what is waited for from here on; the limit is for each of these."""
        self._for = what

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        """Wait for the end of the block, or for a limit in which nothing new is waited for."""
        now: str | None = None
        while now != self._for:
            now = self._for
            if self._done.wait(self._seconds):
                return
        print(
            f"megatron_mhc: {self._who} has waited {self._seconds:g} seconds for {self._for}. Look"
            f" at the output of the ranks that did not come, and at the network between them; where"
            f" they are only slow, raise {VARIABLE}. This rank stops now.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
