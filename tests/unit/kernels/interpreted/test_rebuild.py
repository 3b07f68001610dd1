"""`rebuild` under Triton's interpreter: forward only, and bit for bit."""

import pytest
import torch

from tests.kernel_cases import check_rebuild


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case", [(5, 4, 131, 7), (1, 1, 33, 1), (9, 2, 40, 2), (3, 8, 40, 6), (0, 4, 24, 3)]
)
def test_rebuild_equals_the_forward_to_the_bit(case: tuple, dtype: torch.dtype) -> None:
    """One site alone, several launches, an odd width, every n, no tokens."""
    check_rebuild(*case, dtype, "cpu")
