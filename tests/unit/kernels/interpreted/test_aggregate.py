"""`aggregate` under Triton's interpreter; as the smallest, also for what no operation can do."""

import pytest
import torch

from megatron_mhc import kernels
from tests.unit.kernels.interpreted.operation_tests import Operation


class TestAggregate(Operation):
    """What holds for every operation."""

    operation = "aggregate"


def test_float64_is_refused_and_left_to_the_reference() -> None:
    x, h_pre = torch.randn(2, 4, 8).double(), torch.rand(2, 4).double()
    with pytest.raises(ValueError, match="float64"):
        kernels.aggregate(x, h_pre, backend="triton")
    assert kernels.aggregate(x, h_pre).dtype == torch.float64
