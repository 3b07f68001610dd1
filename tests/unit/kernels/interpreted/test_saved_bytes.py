"""What the operations save for their backward, counted, against the formula in `costs`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mhc import MHCConfig, kernels
from megatron_mhc.costs.formulas import activation_bytes_a_token

TOKENS, N, WIDTH = 6, 4, 64


def saved_bytes(boundary: Any, x: Tensor, f: Tensor, *coefficients: Tensor) -> int:
    """Bytes that a boundary between two sites saves, its parameters left out, a memory once."""
    rows = N * N + 2 * N
    parameters = [torch.zeros(rows, N * WIDTH), torch.full((3,), 0.01), torch.zeros(rows)]
    for parameter in parameters:
        parameter.requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        boundary(x, f, *coefficients, *parameters, backend="triton")
    return sum(
        size
        for address, size in kept.items()
        if address not in {p.untyped_storage().data_ptr() for p in parameters}
    )


@pytest.mark.parametrize("convention", ["paper", "deepseek_v4_1"])
def test_a_site_keeps_what_the_formula_says(convention: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, N, WIDTH, generator=generator).bfloat16().requires_grad_()
    f = torch.randn(TOKENS, WIDTH, generator=generator).bfloat16().requires_grad_()
    h_post = torch.rand(TOKENS, N, generator=generator).requires_grad_()
    h_res = torch.rand(TOKENS, N, N, generator=generator).requires_grad_()
    h_pre = torch.rand(TOKENS, N, generator=generator).requires_grad_()
    mhc = MHCConfig(convention=convention)
    if mhc.delayed:
        found = saved_bytes(kernels.combine_read, x, f, h_post, h_res, h_pre)
    else:
        found = saved_bytes(kernels.combine_pre, x, f, h_post, h_res)
    # a boundary saves the streams that its first site read and those that it wrote: the next one's.
    # u is the sublayer's to save, in the place of the residual that the ordinary model keeps
    stream = 2 * WIDTH * TOKENS
    site = activation_bytes_a_token(mhc, 1, WIDTH, 2) * TOKENS
    assert found - N * stream == site
