"""`aggregate` under Triton's interpreter; as the smallest, also for what no operation can do."""

import contextlib

import pytest
import torch

from megatron_mhc import kernels
from tests.unit.interpreted.operation import Operation, Watch


class TestAggregate(Operation):
    """What holds for every operation."""

    operation = "aggregate"


@pytest.mark.parametrize("traced", [False, True])
def test_a_gradients_gradient_is_refused(traced: bool) -> None:
    x, h_pre = torch.randn(2, 4, 8), torch.rand(2, 4)
    with Watch() if traced else contextlib.nullcontext():
        u = kernels.aggregate(x.requires_grad_(), h_pre.requires_grad_(), backend="triton")
        (dx,) = torch.autograd.grad(u.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError):  # and not the other terms' gradient alone
            (dx + x).sum().backward()


def test_float64_is_refused_and_left_to_the_reference() -> None:
    x, h_pre = torch.randn(2, 4, 8).double(), torch.rand(2, 4).double()
    with pytest.raises(ValueError, match="float64"):
        kernels.aggregate(x, h_pre, backend="triton")
    assert kernels.aggregate(x, h_pre).dtype == torch.float64
