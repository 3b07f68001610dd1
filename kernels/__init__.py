"""The mathematics of mHC: `kernels.reference` defines it, the operations here are what to call."""

from . import reference
from .arguments import Mixing
from .backend import TRITON_STREAMS, use_backend, why_not_triton
from .backend import resolve as resolve_backend
from .functional import (
    aggregate,
    coefficients,
    combine,
    combine_pre,
    combine_pre_with_h_pre,
    combine_read,
    hc_coefficients,
    head,
    pre,
    pre_with_h_pre,
    rebuild,
    sinkhorn,
)

__all__ = [
    "TRITON_STREAMS",
    "Mixing",
    "aggregate",
    "coefficients",
    "combine",
    "combine_pre",
    "combine_pre_with_h_pre",
    "combine_read",
    "hc_coefficients",
    "head",
    "pre",
    "pre_with_h_pre",
    "rebuild",
    "reference",
    "resolve_backend",
    "sinkhorn",
    "use_backend",
    "why_not_triton",
]
