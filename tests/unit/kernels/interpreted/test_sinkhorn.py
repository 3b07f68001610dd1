"""`sinkhorn` under Triton's interpreter."""

import torch

from megatron_mhc import kernels
from tests.unit.kernels.interpreted.operation_tests import Operation


class TestSinkhorn(Operation):
    """What holds for every operation."""

    operation = "sinkhorn"


def test_large_logits_stay_doubly_stochastic() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.rand(64, 4, 4, generator=generator) * 160 - 80).requires_grad_()
    for eps in (0.0, 1e-6):
        matrix = kernels.sinkhorn(logits, eps=eps, backend="triton")
        # four fp32 roundings of a row that adds up to one; eps itself in the other convention
        assert (matrix.sum(-1) - 1).abs().max() < 1e-6 + 5 * eps
        wanted = kernels.reference.sinkhorn(logits.double(), eps=eps)
        # a difference of up to 160 rounds by 2^-17; exp makes that relative to an entry m, and
        # m (1 - m) <= 1/4 of it is left in the matrix
        assert (matrix - wanted).abs().max() < 2e-6
        matrix.square().sum().backward()
        assert bool(torch.isfinite(logits.grad).all())
