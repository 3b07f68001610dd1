"""Matplotlib, where there is no screen."""

from typing import Any


def pyplot() -> Any:
    """`matplotlib.pyplot`, which draws into files; imported when there is something to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
