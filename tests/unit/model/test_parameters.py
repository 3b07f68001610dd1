"""What mHC's parameters carry survives what PyTorch may do to a module's parameters."""

import copy
from collections.abc import Callable

import pytest
import torch

from megatron_mhc import MHCConfig
from megatron_mhc.model.connection import Head, HyperConnection
from megatron_mhc.model.parameters import Fp32Module, is_hyper_connection

WIDTH = 8


def connection() -> Fp32Module:
    """The third site of a model, under sequence parallelism."""
    return HyperConnection(MHCConfig(), WIDTH, 2, sequence_parallel=True)


def unconstrained() -> Fp32Module:
    """The same of variant hc."""
    return HyperConnection(MHCConfig(variant="hc"), WIDTH, 2, sequence_parallel=True)


def head() -> Fp32Module:
    """A learned head, under sequence parallelism."""
    return Head(MHCConfig(convention="deepseek_v4"), WIDTH, sequence_parallel=True)


KINDS = pytest.mark.parametrize("build", [connection, unconstrained, head])


def assert_marked(module: Fp32Module) -> None:
    """Every parameter has its marks, Megatron's own among them."""
    for name, parameter in module.named_parameters():
        assert is_hyper_connection(parameter), name
        assert parameter.sequence_parallel, name  # type: ignore[attr-defined]
        assert parameter.tensor_model_parallel is False, name  # type: ignore[attr-defined]
        assert parameter.dtype == torch.float32 and parameter.requires_grad, name


def marked(module: Fp32Module) -> Fp32Module:
    """`module` with an attribute that Megatron sets on every parameter of a model that it built."""
    for parameter in module.parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
    return module


@KINDS
@pytest.mark.parametrize("swap", [False, True])
def test_leaving_the_meta_device_keeps_marks_and_brings_the_start(
    build: Callable[[], Fp32Module], swap: bool
) -> None:
    with torch.device("meta"):
        module = marked(build())
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        module.bfloat16().to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert_marked(module)
    for name, value in build().state_dict().items():
        assert torch.equal(module.get_parameter(name), value), name


@KINDS
def test_an_assigned_state_keeps_the_marks(build: Callable[[], Fp32Module]) -> None:
    with torch.device("meta"):
        module = marked(build())
    trained = {name: value + 1 for name, value in build().state_dict().items()}
    module.load_state_dict(copy.deepcopy(trained), assign=True)
    assert_marked(module)
    for name, value in trained.items():
        assert torch.equal(module.get_parameter(name), value), name


@KINDS
def test_a_move_changes_no_value(build: Callable[[], Fp32Module]) -> None:
    module = marked(build())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1
    values = copy.deepcopy(module.state_dict())
    module.bfloat16().to("cpu")
    assert_marked(module)
    assert all(torch.equal(module.get_parameter(name), value) for name, value in values.items())
    module.reset_parameters()
    for name, value in build().state_dict().items():
        assert torch.equal(module.get_parameter(name), value), name


def test_parameters_stay_fp32_and_move() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), HyperConnection(MHCConfig(), 6, 0))
    module.bfloat16()
    assert module[0].weight.dtype == torch.bfloat16
    assert {p.dtype for p in module[1].parameters()} == {torch.float32}
    module.to("meta")
    assert {p.device.type for p in module[1].parameters()} == {"meta"}
    assert {p.dtype for p in module[1].parameters()} == {torch.float32}
