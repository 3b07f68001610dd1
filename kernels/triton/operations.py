"""The operations in Triton, under the names and signatures of `reference`."""

from .aggregate import aggregate
from .coefficients import coefficients
from .combine import combine
from .combine_pre import combine_pre, combine_pre_with_h_pre
from .head import head
from .pre import pre, pre_with_h_pre
from .rebuild import rebuild
from .sinkhorn import sinkhorn

__all__ = [
    "aggregate",
    "coefficients",
    "combine",
    "combine_pre",
    "combine_pre_with_h_pre",
    "head",
    "pre",
    "pre_with_h_pre",
    "rebuild",
    "sinkhorn",
]
