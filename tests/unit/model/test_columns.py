"""H_pre in columns behind the streams: no bit of it is lost, nor of its gradient."""

import pytest
import torch

from megatron_mhc import MHCConfig
from megatron_mhc.model.columns import extra_columns, join, part

DELAYED = MHCConfig(convention="deepseek_v4_1")
N, WIDTH = 4, 24


def weights(scale: float = 1.0) -> torch.Tensor:
    """[s, b, n] in fp32, as a sigmoid leaves them, over many orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    return scale * torch.sigmoid(6 * torch.randn(50, 3, N, generator=generator)) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_is_joined_comes_apart_to_the_bit(dtype: torch.dtype) -> None:
    h_pre = weights().double() / 3 if dtype == torch.float64 else weights()
    streams = torch.randn(50, 3, N * WIDTH).to(dtype)
    joined = join(streams, h_pre)
    assert joined.shape[-1] == N * WIDTH + extra_columns(DELAYED, dtype) and joined.dtype == dtype
    assert joined._base is None  # a stage frees what it has sent
    got_streams, got = part(joined, N * WIDTH)
    assert torch.equal(got_streams, streams) and got_streams.is_contiguous()
    assert got.dtype == h_pre.dtype and torch.equal(got, h_pre)


def test_fp16_keeps_weights_to_half_its_smallest_number() -> None:
    _, got = part(join(torch.zeros(50, 3, N * WIDTH, dtype=torch.float16), weights()), N * WIDTH)
    assert (got - weights()).abs().max() <= 2.0**-25


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_come_back_to_the_bit(dtype: torch.dtype, scale: float) -> None:
    """Through a message, too: what arrives is a leaf, whose gradient is sent back."""
    streams = torch.randn(50, 3, N * WIDTH).to(dtype).requires_grad_()
    h_pre = weights().requires_grad_()
    sent = join(streams, h_pre)
    arrived = sent.detach().requires_grad_()
    gradients = (torch.randn(50, 3, N * WIDTH).to(dtype), weights(scale))
    torch.autograd.backward(part(arrived, N * WIDTH), gradients)
    sent.backward(arrived.grad)
    assert torch.equal(streams.grad, gradients[0]) and torch.equal(h_pre.grad, gradients[1])


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_may_have_no_gradient(used: int) -> None:
    tensors = (torch.randn(2, N * WIDTH).requires_grad_(), torch.rand(2, N).requires_grad_())
    part(join(*tensors), N * WIDTH)[used].sum().backward()
    assert bool((tensors[used].grad == 1).all()) and not tensors[1 - used].grad.any()


def test_a_weight_that_is_no_number_stays_none() -> None:
    bad = torch.tensor([[0.5, float("nan"), 0.25, 0.125]])
    _, got = part(join(torch.zeros(1, N * WIDTH, dtype=torch.bfloat16), bad), N * WIDTH)
    assert got.isnan().tolist() == bad.isnan().tolist()


def test_there_are_no_columns_where_sites_are_not_delayed() -> None:
    assert extra_columns(MHCConfig(), torch.bfloat16) == 0
    assert [extra_columns(DELAYED, d) for d in (torch.bfloat16, torch.float32)] == [12, 4]
