"""mHC's parameters where a model is built on the meta device and gets its memory later."""

from collections.abc import Callable

import pytest
import torch

from megatron_mhc import MHCConfig
from megatron_mhc.connection import Head, HyperConnection
from megatron_mhc.parameters import is_hyper_connection

MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "mhc": lambda: HyperConnection(MHCConfig(), 8, 3, sequence_parallel=True),
    "zero": lambda: HyperConnection(MHCConfig(init="zero"), 8, 3, sequence_parallel=True),
    "one stream": lambda: HyperConnection(MHCConfig(num_streams=1), 8, 3, sequence_parallel=True),
    "hc": lambda: HyperConnection(MHCConfig(variant="hc"), 8, 3, sequence_parallel=True),
    "head": lambda: Head(MHCConfig(convention="deepseek_v4"), 8, sequence_parallel=True),
}


@pytest.mark.parametrize("kind", MODULES)
def test_from_the_meta_device_come_the_start_and_the_marks(kind: str) -> None:
    usual = MODULES[kind]()
    with torch.device("meta"):
        model = torch.nn.Sequential(MODULES[kind]())
    for parameter in model.parameters():
        parameter.set_by_megatron = "before it materializes"
    # Float16Module casts before, and is no reason to cast ours
    model = model.bfloat16().to_empty(device="cpu")
    parameters = dict(model[0].named_parameters())
    assert parameters.keys() == dict(usual.named_parameters()).keys()
    for name, want in usual.named_parameters():
        got = parameters[name]
        assert got.dtype == torch.float32 and torch.equal(got, want), name
        assert is_hyper_connection(got) and got.sequence_parallel
        assert got.set_by_megatron == "before it materializes"


@torch.no_grad()
def test_moving_changes_no_value_and_resetting_gives_the_start() -> None:
    usual, moved = MODULES["mhc"](), MODULES["mhc"]()
    for parameter in moved.parameters():
        parameter.add_(1)
    moved.to(torch.bfloat16).cpu()
    for name, parameter in moved.named_parameters():
        assert torch.equal(parameter, usual.get_parameter(name) + 1)
    moved.reset_parameters()
    for name, parameter in moved.named_parameters():
        assert torch.equal(parameter, usual.get_parameter(name)) and is_hyper_connection(parameter)
