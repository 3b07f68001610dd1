"""`combine_read` under Triton's interpreter: the single pass of delayed sites."""

import torch

from megatron_mhc import kernels
from tests.kernel_cases import inputs
from tests.unit.kernels.interpreted.operation_tests import Projecting

MIXING = ("x", "f", "h_post", "h_res", "f_bias")


class TestCombineRead(Projecting):
    """What holds for every operation that projects."""

    operation = "combine_read"


def test_boundary_equals_its_parts_to_the_bit() -> None:
    """So what a recompute block rebuilds, and what a stage's first site reads, are its bits."""
    given = inputs("combine_read", 7, 4, 72, torch.bfloat16, "cpu")
    y, u, *coefficients = kernels.combine_read(**given, backend="triton")
    mixing = {name: given[name] for name in MIXING}
    assert torch.equal(y, kernels.combine(**mixing, backend="triton"))
    assert torch.equal(u, kernels.aggregate(y, given["h_pre"], backend="triton"))
    parameters = {name: given[name] for name in ("phi", "alpha", "bias")}
    alone = kernels.coefficients(y, **parameters, backend="triton")
    assert all(map(torch.equal, coefficients, alone))
    ended = [tuple(given[name].detach() for name in ("f", "h_post", "h_res", "f_bias"))]
    ys, us = kernels.rebuild(given["x"], [given["h_pre"]] * 2, ended, backend="triton")
    assert torch.equal(ys[0], y) and torch.equal(us[1], u)


def test_streams_in_one_dimension_have_the_same_bits() -> None:
    found = []
    for is_flat in (False, True):
        arguments = inputs("combine_read", 7, 4, 72, torch.bfloat16, "cpu")
        given = dict(arguments)
        if is_flat:
            given["x"] = arguments["x"].flatten(-2)
        out = kernels.combine_read(**given, backend="triton")
        assert out[0].shape == given["x"].shape
        torch.autograd.backward(out, [torch.ones_like(result) for result in out])
        found.append([r.flatten() for r in out] + [t.grad for t in arguments.values()])
    assert all(map(torch.equal, *found))


def test_all_but_one_of_the_gradients_are_absent() -> None:
    for index in range(5):
        arguments = inputs("combine_read", 4, 4, 40, torch.float32, "cpu")
        exact = {k: v.detach().double().requires_grad_() for k, v in arguments.items()}
        kernels.combine_read(**arguments, backend="triton")[index].sum().backward()
        kernels.combine_read(**exact, backend="torch")[index].sum().backward()
        for name, argument in arguments.items():
            if exact[name].grad is None:
                assert argument.grad is None or not argument.grad.any(), (index, name)
                continue
            # fp32 sums; a gradient that is exactly zero is measured absolutely
            error = (argument.grad - exact[name].grad).norm()
            assert error <= 1e-5 * (1 + exact[name].grad.norm()), (index, name)


def test_saved_tensors_are_few() -> None:
    """Beside x, f, y: at most 256 bytes a token, and no fp32 tensor as wide as the streams."""
    tokens, n, width = 16, 4, 256
    arguments = inputs("combine_read", tokens, n, width, torch.bfloat16, "cpu")
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, *_ = kernels.combine_read(**arguments, backend="triton")
    streams = {arguments["x"].data_ptr(), arguments["f"].data_ptr(), y.data_ptr()}
    a_token = [t for p, t in saved.items() if t.shape[:1] == (tokens,) and p not in streams]
    assert sum(t.nbytes for t in a_token) <= 256 * tokens
    assert all(t.numel() < tokens * n * width for t in a_token)


def test_compiles_as_one_graph() -> None:
    """torch.compile finds operators, and nothing that it cannot trace."""
    plain = inputs("combine_read", 5, 4, 40, torch.bfloat16, "cpu")
    traced = {name: t.detach().clone().requires_grad_() for name, t in plain.items()}

    def site(**arguments: torch.Tensor) -> torch.Tensor:
        return sum(t.float().sum() for t in kernels.combine_read(**arguments, backend="triton"))

    site(**plain).backward()
    torch.compile(site, fullgraph=True, backend="aot_eager")(**traced).backward()
    for name, tensor in traced.items():
        assert torch.equal(tensor.grad, plain[name].grad), name
