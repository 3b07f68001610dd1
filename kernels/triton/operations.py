"""The operations in Triton, named as in `reference`, with the options of `coefficients` as one."""

from .aggregate import aggregate
from .combine import combine
from .combine_pre import combine_pre, combine_pre_with_h_pre
from .combine_read import combine_read
from .hc import hc_coefficients
from .head import head
from .pre import coefficients, pre, pre_with_h_pre
from .rebuild import rebuild
from .sinkhorn import sinkhorn

__all__ = [
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
    "sinkhorn",
]
