"""Names that users type or that files hold: they stay, whatever moves inside."""

import dataclasses
import importlib
import inspect

import pytest
import torch

import megatron_mhc
from megatron_mhc import MHCConfig, kernels

FIELDS = {
    "num_streams": 4,
    "sinkhorn_iterations": 20,
    "convention": "paper",
    "init": "residual",
    "variant": "mhc",
    "backend": "auto",
    "recompute": None,
    "overlap_p2p": False,
}
SETTINGS = (
    *("iterations", "norm_eps", "pre_eps", "sinkhorn_eps", "norm_form", "sinkhorn_order"),
    "backend",
)
OPERATIONS = {
    "sinkhorn": ("logits", "iterations", "eps", "backend"),
    "coefficients": ("x", "phi", "alpha", "bias", *SETTINGS),
    "aggregate": ("x", "h_pre", "backend"),
    "pre": ("x", "phi", "alpha", "bias", *SETTINGS),
    "combine": ("x", "f", "h_post", "h_res", "f_bias", "backend"),
    "combine_pre": (
        *("x", "f", "h_post", "h_res", "phi", "alpha", "bias", "f_bias"),
        *SETTINGS,
    ),
    "combine_read": (
        *("x", "f", "h_post", "h_res", "h_pre", "phi", "alpha", "bias", "f_bias"),
        *SETTINGS,
    ),
    "head": ("x", "fn", "scale", "base", "norm_eps", "pre_eps", "backend"),
    "hc_coefficients": ("x", "theta", "alpha", "bias", "backend"),
}
TORCH_OPERATORS = (
    "aggregate aggregate_backward coefficients coefficients_backward combine combine_backward"
    " combine_pre combine_pre_backward combine_read combine_read_backward hc_project"
    " hc_project_backward head head_backward pre pre_backward sinkhorn sinkhorn_backward"
)


def test_the_settings() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(MHCConfig)}
    assert fields.items() >= FIELDS.items()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_takes_what_it_took(name: str) -> None:
    for module in (kernels, kernels.reference):
        parameters = tuple(inspect.signature(getattr(module, name)).parameters)
        wanted = OPERATIONS[name]
        if module is kernels.reference:  # which is one backend
            wanted = tuple(parameter for parameter in wanted if parameter != "backend")
            if parameters[-1] == "options":  # any keyword of `coefficients`
                parameters = (*parameters[:-1], *SETTINGS[:-1])
        assert parameters == wanted


def test_what_torch_calls_the_operations() -> None:
    """A compiled or exported graph names them."""
    importlib.import_module("megatron_mhc.kernels.triton.operations")
    missing = [n for n in TORCH_OPERATORS.split() if not hasattr(torch.ops.megatron_mhc, n)]
    assert not missing


@pytest.mark.parametrize(
    "name",
    [
        "megatron_mhc:with_mhc",
        "megatron_mhc.spec:with_mhc",
        "megatron_mhc.spec:gpt_layer_spec",
        "megatron_mhc.spec:hybrid_stack_spec",
        "megatron_mhc.run:main",
        "megatron_mhc.__main__:main",
        "megatron_mhc.kernels:use_backend",
        "megatron_mhc.kernels:reference",
        "megatron_mhc.patches:registry",
        "megatron_mhc.patches.cpu:enter",
        "megatron_mhc.patches.cpu:leave",
    ],
)
def test_a_name_is_where_it_was(name: str) -> None:
    module, attribute = name.split(":")
    assert hasattr(importlib.import_module(module), attribute)


def test_the_package_says_what_it_offers() -> None:
    assert set(megatron_mhc.__all__) == {"MHCConfig", "with_mhc"}
