"""Tables of cases of which some are thorough: much like others, and for `make test-all` alone."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def parameters(cases: Iterable[str], thorough: Collection[str]) -> list[Any]:
    """For `parametrize`: all of them, the thorough ones marked."""
    return [
        pytest.param(name, marks=pytest.mark.thorough if name in thorough else ()) for name in cases
    ]


def beside(case: str, cases: Iterable[str], thorough: Collection[str]) -> list[str]:
    """Those that one launch trains together with a case: the thorough ones have another."""
    return [name for name in cases if (name in thorough) == (case in thorough)]
