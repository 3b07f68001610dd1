"""Mappings for Megatron-Bridge: what its own registry and mappings make of them."""

import pytest
import torch

from megatron_mhc import MHCConfig
from megatron_mhc.model.connection import Head, HyperConnection
from tests.megatron.common.hf_checkpoints import LAYERS, MODELS, WIDTH, hyper_connections, write_hf

param_mapping = pytest.importorskip(
    "megatron.bridge.models.conversion.param_mapping", reason="megatron-bridge is not installed"
)
registry = pytest.importorskip("megatron.bridge.models.conversion.mapping_registry")


@pytest.mark.parametrize("model", MODELS)
def test_bridge_finds_and_maps_every_parameter(model: str, tmp_path: object) -> None:
    from megatron_mhc.tools.bridge import hyper_connection_mappings
    from megatron_mhc.tools.hf_sites import state_dict_of

    tensors = hyper_connections(model)
    wanted = state_dict_of(write_hf(tmp_path / "hf", model, tensors))[1]  # type: ignore[operator]
    known = registry.MegatronMappingRegistry(*hyper_connection_mappings(model, LAYERS))
    mhc = MHCConfig(convention="deepseek_v4")
    modules = HyperConnection(mhc, WIDTH, 0), Head(mhc, WIDTH)
    back = {}
    for name, value in wanted.items():
        mapping = known.megatron_to_hf_lookup(name)
        module = modules[".head." in name]
        got = mapping.hf_to_megatron(tensors[mapping.hf_param], module)
        assert torch.equal(got, value) and got.dtype == torch.float32, name
        back |= mapping.megatron_to_hf(got, module)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(back[name], value.float()), name
