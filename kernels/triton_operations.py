"""The operations in Triton, under the names and signatures of `reference`."""

from .triton_aggregate import aggregate
from .triton_coefficients import coefficients
from .triton_combine import combine
from .triton_combine_pre import combine_pre, combine_pre_with_h_pre
from .triton_head import head
from .triton_pre import pre, pre_with_h_pre
from .triton_rebuild import rebuild
from .triton_sinkhorn import sinkhorn

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
