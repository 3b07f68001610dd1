"""`combine_read`, the single pass of delayed sites, on a GPU: float64, bits, bytes."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_mhc import kernels
from tests.kernel_cases import DEEPSEEK, LARGE_EPS, OTHER_FORMS, check, inputs, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]
BF16 = torch.bfloat16
V4_1 = {**DEEPSEEK, "norm_eps": 1e-20}


def both_ways(arguments: dict[str, torch.Tensor], **keywords: float) -> list[torch.Tensor]:
    """All results and all gradients for a gradient of ones."""
    out = run(kernels.combine_read, arguments, backend="triton", **keywords)
    torch.autograd.backward(out, [torch.ones_like(result) for result in out])
    return [*(r.detach() for r in out), *(argument.grad for argument in arguments.values())]


@pytest.mark.parametrize("width", [1280, 2560, 4096, 5120, 7168, 1111])
def test_real_widths(width: int) -> None:
    check("combine_read", 127, 4, width, BF16, "cuda", V4_1)


@pytest.mark.parametrize("tokens", [1, 13, 8191])
def test_ragged_token_counts(tokens: int) -> None:
    check("combine_read", tokens, 4, 1280, BF16, "cuda", V4_1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_other_dtypes_and_stream_counts(n: int, dtype: torch.dtype) -> None:
    check("combine_read", 70, n, 520, dtype, "cuda", V4_1, iterations=5)


@pytest.mark.parametrize("convention", [LARGE_EPS, OTHER_FORMS], ids=["eps", "other forms"])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_large_eps(n: int, convention: dict[str, float]) -> None:
    check("combine_read", 66, n, 520, BF16, "cuda", convention, iterations=4)


def test_it_equals_its_parts_and_what_is_rebuilt_to_the_bit() -> None:
    for width, tokens in ((4096, 1000), (1111, 33)):
        given = inputs("combine_read", tokens, 4, width, BF16, "cuda")
        y, u, *coefficients = kernels.combine_read(**given, backend="triton", **V4_1)
        mixing = {name: given[name] for name in ("x", "f", "h_post", "h_res", "f_bias")}
        assert torch.equal(y, kernels.combine(**mixing, backend="triton"))
        assert torch.equal(u, kernels.aggregate(y, given["h_pre"], backend="triton"))
        parameters = {name: given[name] for name in ("phi", "alpha", "bias")}
        alone = kernels.coefficients(y, **parameters, backend="triton", **V4_1)
        assert all(map(torch.equal, coefficients, alone))
        ended = [tuple(given[name].detach() for name in ("f", "h_post", "h_res", "f_bias"))]
        ys, us = kernels.rebuild(given["x"], [given["h_pre"]] * 2, ended, backend="triton")
        assert torch.equal(ys[0], y) and torch.equal(us[1], u)


def test_the_streams_that_the_backward_mixes_again_are_the_forwards() -> None:
    """To the bit: the gradient of h_pre shows them, where du is one in one channel alone."""
    given = inputs("combine_read", 300, 4, 1024, BF16, "cuda")
    y, u, *_ = kernels.combine_read(**given, backend="triton", **V4_1)
    # so the sum has one term, which nothing rounds
    du = torch.zeros_like(u)
    channel = torch.arange(len(u), device="cuda") * 7 % u.shape[1]
    du[torch.arange(len(u), device="cuda"), channel] = 1.0
    (d_pre,) = torch.autograd.grad(u, given["h_pre"], du)
    wanted = y.detach()[torch.arange(len(u), device="cuda"), :, channel]
    assert torch.equal(d_pre, wanted.float())


def test_two_runs_give_the_same_bits() -> None:
    noise = torch.randn(4096, 4096, device="cuda")
    wanted = both_ways(inputs("combine_read", 3000, 4, 4096, BF16, "cuda"), **V4_1)
    side = torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(side):  # something else runs at the same time
            for _ in range(20):
                noise = noise @ noise * 1e-2
        got = both_ways(inputs("combine_read", 3000, 4, 4096, BF16, "cuda"), **V4_1)
        assert all(map(torch.equal, got, wanted))


def test_more_elements_than_32_bits_address() -> None:
    """Streams of 2^31 elements: their last tokens are what those tokens alone give."""
    few, tokens, width = 512, 2**17, 4096
    a_token = ("x", "f", "h_post", "h_res", "h_pre")
    arguments = inputs("combine_read", few, 4, width, BF16, "cuda")
    wanted = both_ways(arguments)[: 5 + len(a_token)]
    with torch.no_grad():
        many = {
            name: t.repeat(tokens // few, *(1,) * (t.dim() - 1)) if name in a_token else t.clone()
            for name, t in arguments.items()
        }
    for tensor in many.values():
        tensor.requires_grad_()
    got = both_ways(many)[: 5 + len(a_token)]
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        for part in (a[:few], a[tokens // 2 : tokens // 2 + few], a[-few:]):
            assert torch.equal(part, b), index


def test_saved_memory() -> None:
    """Live memory after the forward beyond its results: at most 256 bytes a token."""
    tokens, width = 8192, 4096
    arguments = inputs("combine_read", tokens, 4, width, BF16, "cuda")
    run(kernels.combine_read, arguments, backend="triton", **V4_1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = run(kernels.combine_read, arguments, backend="triton", **V4_1)
    extra = torch.cuda.memory_allocated() - before - sum(result.nbytes for result in out)
    assert extra <= 256 * tokens
