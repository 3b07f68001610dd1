"""Arguments that belong together: each is handed on as one."""

from typing import NamedTuple


class Options(NamedTuple):
    """How the coefficients are computed: the keywords of `reference.coefficients`."""

    iterations: int = 20
    norm_eps: float = 1e-6
    pre_eps: float = 0.0
    sinkhorn_eps: float = 0.0


DEFAULT = Options()
"""The paper's."""
