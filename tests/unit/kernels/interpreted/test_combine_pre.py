"""`combine_pre` under Triton's interpreter: the operation of which a model calls the most."""

import contextlib

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_mhc import kernels
from tests.kernel_cases import inputs
from tests.unit.kernels.interpreted.operation_tests import Projecting


class TestCombinePre(Projecting):
    """What holds for every operation that projects."""

    operation = "combine_pre"


def test_boundary_equals_its_halves_to_the_bit() -> None:
    arguments = inputs("combine_pre", 7, 4, 72, torch.bfloat16, "cpu")
    y, *rest = kernels.combine_pre(**arguments, backend="triton")
    first = {name: arguments[name] for name in ("x", "f", "h_post", "h_res", "f_bias")}
    assert torch.equal(y, kernels.combine(**first, backend="triton"))
    second = {name: arguments[name] for name in ("phi", "alpha", "bias")}
    for got, wanted in zip(rest, kernels.pre(y, **second, backend="triton"), strict=True):
        assert torch.equal(got, wanted)


def test_strided_arguments_and_leading_dimensions() -> None:
    arguments = inputs("combine_pre", 6, 2, 20, torch.float32, "cpu")
    flat = kernels.combine_pre(**arguments, backend="triton")
    spread = dict(arguments)
    for name in ("x", "f", "h_post", "h_res"):
        tensor = arguments[name].detach()
        strided = tensor.reshape(2, 3, *tensor.shape[1:]).transpose(0, 1).contiguous()
        spread[name] = strided.transpose(0, 1)  # [2, 3, ...] over another memory order
        assert not spread[name].is_contiguous()
    for got, wanted in zip(kernels.combine_pre(**spread, backend="triton"), flat, strict=True):
        assert torch.equal(got.reshape(wanted.shape), wanted)


def test_what_a_mode_saw_of_strided_arguments_has_their_gradients() -> None:
    """The forward is an operator there; the backward, outside, is not and reads what was saved."""
    found = []
    for is_seen in (False, True):
        leaves = inputs("combine_pre", 6, 2, 20, torch.float32, "cpu")
        strided = {
            name: leaf.t().contiguous().t() if name == "f" else leaf
            for name, leaf in leaves.items()
        }
        strided["x"] = leaves["x"].transpose(0, 2).contiguous().transpose(0, 2)
        assert not strided["x"].is_contiguous() and not strided["f"].is_contiguous()
        with FlopCounterMode(display=False) if is_seen else contextlib.nullcontext():
            out = kernels.combine_pre(**strided, backend="triton")
        torch.autograd.backward(out, [torch.ones_like(result) for result in out])
        found.append([leaf.grad for leaf in leaves.values()])
    assert all(map(torch.equal, *found))


def test_streams_in_one_dimension_have_the_same_bits() -> None:
    found = []
    for is_flat in (False, True):
        arguments = inputs("combine_pre", 7, 4, 72, torch.bfloat16, "cpu")
        given = dict(arguments)
        if is_flat:
            given["x"] = arguments["x"].flatten(-2)
        out = kernels.combine_pre(**given, backend="triton")
        assert out[0].shape == given["x"].shape
        torch.autograd.backward(out, [torch.ones_like(result) for result in out])
        found.append([r.flatten() for r in out] + [t.grad for t in arguments.values()])
    assert all(map(torch.equal, *found))


def test_half_of_the_gradients_is_absent() -> None:
    for index in range(4):
        arguments = inputs("combine_pre", 4, 4, 40, torch.float32, "cpu")
        exact = {k: v.detach().double().requires_grad_() for k, v in arguments.items()}
        kernels.combine_pre(**arguments, backend="triton")[index].sum().backward()
        kernels.combine_pre(**exact, backend="torch")[index].sum().backward()
        for name, argument in arguments.items():
            if exact[name].grad is None:
                continue
            # fp32 sums; a gradient that is exactly zero is measured absolutely
            error = (argument.grad - exact[name].grad).norm()
            assert error <= 1e-5 * (1 + exact[name].grad.norm()), (index, name)


def test_compiles_as_one_graph() -> None:
    """torch.compile finds operators, and nothing that it cannot trace."""
    plain = inputs("combine_pre", 5, 4, 40, torch.bfloat16, "cpu")
    traced = {name: t.detach().clone().requires_grad_() for name, t in plain.items()}

    def site(**arguments: torch.Tensor) -> torch.Tensor:
        return sum(t.float().sum() for t in kernels.combine_pre(**arguments, backend="triton"))

    site(**plain).backward()
    torch.compile(site, fullgraph=True, backend="aot_eager")(**traced).backward()
    for name, tensor in traced.items():
        assert torch.equal(tensor.grad, plain[name].grad), name


def test_saved_tensors_are_few() -> None:
    """Beside x, f, y: at most 256 bytes a token, and no fp32 tensor as wide as the streams."""
    tokens, n, width = 16, 4, 256
    arguments = inputs("combine_pre", tokens, n, width, torch.bfloat16, "cpu")
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, *_ = kernels.combine_pre(**arguments, backend="triton")
    streams = {arguments["x"].data_ptr(), arguments["f"].data_ptr(), y.data_ptr()}
    a_token = [t for p, t in saved.items() if t.shape[:1] == (tokens,) and p not in streams]
    assert sum(t.nbytes for t in a_token) <= 256 * tokens
    assert all(t.numel() < tokens * n * width for t in a_token)
