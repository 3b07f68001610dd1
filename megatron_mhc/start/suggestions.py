"""What a flag that a parser does not know was meant to be."""

import argparse
import difflib
from collections.abc import Iterable
from typing import Any


def near(word: str, known: Iterable[str]) -> str:
    """What is spelled much alike of `known`, as the end of a sentence: `; near are --a, --b`; else
    an empty string."""
    found = difflib.get_close_matches(word.partition("=")[0], known)
    return f"; near are {', '.join(found)}" if found else ""


def suggest(parser: argparse.ArgumentParser) -> None:
    """Have a parser name what is near an unknown `--mhc*` flag, behind its pages of usage."""
    original: Any = parser.error

    def error(message: str) -> Any:
        unknown = [word for word in message.split() if word.startswith("--mhc")]
        known = [flag for flag in parser._option_string_actions if flag.startswith("--mhc")]
        hints = [near(word, known) for word in unknown if word not in known]
        return original(message + "".join(hints))

    parser.error = error  # type: ignore[method-assign]
