"""Selective recompute over the kernels under Triton's interpreter."""

import torch

from tests.unit.model.test_recompute import Layers


def test_recompute_over_the_kernels_is_exact() -> None:
    """Dropped, rebuilt, and the bits of a run that keeps all."""
    found = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model = Layers(recompute, "triton", torch.bfloat16)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(3, 1, 32, generator=generator).bfloat16().requires_grad_()
        normed: list[torch.Tensor] = []
        result = model(x, normed)
        kept = [tensor.untyped_storage().nbytes() for tensor in normed]
        assert all(kept) if not recompute else not any(kept)
        result.float().square().sum().backward()
        gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
        found.append([result.detach(), *gradients])
    for kept_all, rebuilt in zip(*found, strict=True):
        assert torch.equal(kept_all, rebuilt)
