"""The Triton kernels on a GPU: real widths, ragged token counts, bits, graphs, compilation."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from megatron_mhc import kernels
from megatron_mhc.kernels.triton.passes.phi_gradient import LONGEST_SUM
from tests.kernel_cases import (
    DEEPSEEK,
    LARGE_EPS,
    OPERATIONS,
    OTHER_FORMS,
    PAPER,
    check,
    inputs,
    relative,
    run,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]
BF16 = torch.bfloat16
BOUNDARIES = ["combine_pre", "combine_read"]


@pytest.mark.parametrize("width", [1280, 2560, 4096, 5120, 7168, 1111])
def test_boundary_at_real_widths(width: int) -> None:
    check("combine_pre", 127, 4, width, BF16, "cuda")


@pytest.mark.parametrize("tokens", [1, 13, 8191])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_ragged_token_counts(operation: str, tokens: int) -> None:
    check(operation, tokens, 4, 1280, BF16, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_other_dtypes(operation: str, dtype: torch.dtype) -> None:
    check(operation, 130, 4, 1280, dtype, "cuda", DEEPSEEK)


@pytest.mark.parametrize("convention", [LARGE_EPS, OTHER_FORMS], ids=["eps", "other forms"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_large_eps(operation: str, convention: dict[str, Any]) -> None:
    check(operation, 66, 4, 520, BF16, "cuda", convention, iterations=4)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_whole_numbers_as_eps(operation: str) -> None:
    check(operation, 66, 4, 520, BF16, "cuda", dict.fromkeys(PAPER, 1), iterations=4)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_torch_func_differentiates(boundary: str) -> None:
    given = {k: v.detach() for k, v in inputs(boundary, 66, 4, 520, BF16, "cuda").items()}
    operation = getattr(kernels, boundary)

    def loss(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(t.float().sum() for t in operation(**tensors, backend="triton"))

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    loss(leaves).backward()
    for name, gradient in torch.func.grad(loss)(given).items():
        assert torch.equal(gradient, leaves[name].grad), name


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("operation", ["pre", "combine_pre", "head"])
def test_other_stream_counts(operation: str, n: int) -> None:
    check(operation, 70, n, 520, BF16, "cuda", DEEPSEEK, iterations=5)


def test_boundary_equals_its_halves_to_the_bit() -> None:
    for width, tokens in ((4096, 1000), (1111, 33)):
        arguments = inputs("combine_pre", tokens, 4, width, BF16, "cuda")
        y, *rest = kernels.combine_pre(**arguments, backend="triton")
        first = {name: arguments[name] for name in ("x", "f", "h_post", "h_res", "f_bias")}
        assert torch.equal(y, kernels.combine(**first, backend="triton"))
        second = {name: arguments[name] for name in ("phi", "alpha", "bias")}
        halves = kernels.pre(y, **second, backend="triton")
        for name, got, wanted in zip(("u", "h_post", "h_res"), rest, halves, strict=True):
            assert torch.equal(got, wanted), (name, width)


def test_two_runs_give_the_same_bits() -> None:
    def once() -> list[torch.Tensor]:
        arguments = inputs("combine_pre", 3000, 4, 4096, BF16, "cuda")
        out = run(kernels.combine_pre, arguments, backend="triton")
        torch.autograd.backward(out, [torch.ones_like(result) for result in out])
        return [*out, *(argument.grad for argument in arguments.values())]

    noise = torch.randn(4096, 4096, device="cuda")
    wanted = once()
    side = torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(side):  # something else runs at the same time
            for _ in range(20):
                noise = noise @ noise * 1e-2
        for got, expected in zip(once(), wanted, strict=True):
            assert torch.equal(got, expected)


def test_projection_is_as_precise_as_three_tf32_products() -> None:
    """The logits' error from bf16 streams, beside that of the same values in fp32 (tf32x3)."""
    arguments = inputs("coefficients", 2048, 4, 4096, BF16, "cuda")
    del arguments["bias"]
    exact = {name: tensor.detach().double() for name, tensor in arguments.items()}
    bias = torch.zeros(24, device="cuda")
    wanted = kernels.coefficients(**exact, bias=bias.double())
    wide = {**arguments, "x": arguments["x"].float()}
    errors = [
        [relative(a.detach(), b) for a, b in zip(out, wanted, strict=True)]
        for out in (
            kernels.coefficients(**arguments, bias=bias, backend="triton"),
            kernels.coefficients(**wide, bias=bias, backend="triton"),
        )
    ]
    print("h_pre, h_post, h_res: bf16 streams", errors[0], "tf32x3", errors[1])
    # phi is exact as three bf16 terms; fp32's own rounding in sums of thousands is left
    assert max(errors[0]) < 4e-7 and max(errors[1]) < 4e-7


def test_rows_sum_to_one() -> None:
    arguments = inputs("pre", 4096, 4, 4096, BF16, "cuda")
    _, _, h_res = kernels.pre(**arguments, backend="triton")
    assert (h_res.sum(-1) - 1).abs().max() < 1e-6  # four roundings of a row's sum in fp32


def test_large_logits() -> None:
    logits = (torch.rand(4096, 4, 4, device="cuda") * 160 - 80).requires_grad_()
    matrix = kernels.sinkhorn(logits, backend="triton")
    # a difference of up to 160 rounds by 2^-17, and nearly that again times log2(e) in the GPU's
    # exp: 1.3e-5 of an entry m, m (1 - m) <= 1/4 of it in the matrix, in two entries of a row
    assert (matrix - kernels.reference.sinkhorn(logits.double())).abs().max() < 1e-5
    matrix.square().sum().backward()
    assert bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_cuda_graph_replays_the_site(boundary: str) -> None:
    arguments = inputs(boundary, 500, 4, 1280, BF16, "cuda")

    def step() -> tuple[torch.Tensor, ...]:
        out = run(getattr(kernels, boundary), arguments, backend="triton")
        weights = [torch.ones_like(result) for result in out]
        return *out, *torch.autograd.grad(out, list(arguments.values()), weights)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = step()
    for result in captured:
        result.detach().zero_()
    graph.replay()
    for got, expected in zip(captured, eager, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_compiles_as_one_graph(boundary: str) -> None:
    arguments = inputs(boundary, 300, 4, 1280, BF16, "cuda")
    operation = getattr(kernels, boundary)

    def site(**tensors: torch.Tensor) -> torch.Tensor:
        y, u, *rest, h_res = operation(**tensors)
        others = u.float().sum() + sum(t.sum() for t in rest)
        return (y * 2).float().sum() + others + h_res.square().sum()

    site(**arguments).backward()
    wanted = {name: argument.grad for name, argument in arguments.items()}
    again = {k: v.detach().clone().requires_grad_() for k, v in arguments.items()}
    torch.compile(site, fullgraph=True)(**again).backward()
    for name, argument in again.items():
        # the same kernels on gradients that no rounding reaches (2, 1, 1 and 2 h_res): equal, but
        # for what a compiler may do to fp32 sums of some hundred terms
        assert torch.allclose(argument.grad, wanted[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(("tokens", "width"), [(2**17, 4096), (2**20, 520)])
def test_more_elements_than_32_bits_address(tokens: int, width: int) -> None:
    """Streams of 2^31 elements and more: their last tokens are what those tokens alone give."""
    few = 512
    gradients = ("x", "f", "h_post", "h_res")
    arguments = inputs("combine_pre", few, 4, width, BF16, "cuda")
    out = run(kernels.combine_pre, arguments, backend="triton")
    torch.autograd.backward(out, [torch.ones_like(result) for result in out])
    wanted = [*(result.detach() for result in out), *(arguments[name].grad for name in gradients)]
    with torch.no_grad():
        many = {
            name: t.repeat(tokens // few, *(1,) * (t.dim() - 1)) if name in gradients else t.clone()
            for name, t in arguments.items()
        }
    for tensor in many.values():
        tensor.requires_grad_()
    assert many["x"].numel() >= 2**31
    out = run(kernels.combine_pre, many, backend="triton")
    torch.autograd.backward(out, [torch.ones_like(result) for result in out])
    got = [*(result.detach() for result in out), *(many[name].grad for name in gradients)]
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        for part in (a[:few], a[tokens // 2 : tokens // 2 + few], a[-few:]):
            assert torch.equal(part, b), index
    # One sum of equal parts. phi's gradient has the most additions in a row: 16 tokens an addition
    # and three terms, each a last place of fp32 too small at most. Twice that, as terms cancel.
    bound = 2 * (3 * LONGEST_SUM // 16) * 2.0**-23
    for name in ("phi", "alpha", "bias", "f_bias"):
        times = tokens // few
        assert relative(many[name].grad, times * arguments[name].grad.double()) < bound, name


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_new_token_counts_compile_nothing(boundary: str) -> None:
    import triton

    compiled = []
    previous = triton.knobs.runtime.jit_post_compile_hook
    for tokens in (1, 16, 77, 1024, 1025):
        if tokens == 16:
            triton.knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(event)
        arguments = inputs(boundary, tokens, 4, 1280, BF16, "cuda")
        out = run(getattr(kernels, boundary), arguments, backend="triton")
        torch.autograd.backward(out, [torch.ones_like(result) for result in out])
    triton.knobs.runtime.jit_post_compile_hook = previous
    assert not compiled


@pytest.mark.parametrize("convention", [PAPER, DEEPSEEK], ids=["paper", "deepseek_v4"])
def test_saved_memory(convention: dict[str, Any]) -> None:
    """Live memory after the forward beyond its results: at most 256 bytes a token."""
    tokens, width = 8192, 4096
    arguments = inputs("combine_pre", tokens, 4, width, BF16, "cuda")
    run(kernels.combine_pre, arguments, backend="triton", **convention)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = run(kernels.combine_pre, arguments, backend="triton", **convention)
    extra = torch.cuda.memory_allocated() - before - sum(result.nbytes for result in out)
    assert extra <= 256 * tokens
