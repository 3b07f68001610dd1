"""Turning mHC on in a library: `with_mhc` on what Megatron's spec functions return."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_mhc import MHCConfig, with_mhc
from megatron_mhc.patches import registry


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """What `with_mhc` applies is undone again."""
    yield
    registry.undo()


def specs() -> dict[str, Any]:
    """What Megatron's own spec functions return, by name."""
    from megatron.core.models.gpt import gpt_layer_specs as functions
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4)
    moe = TransformerConfig(
        num_layers=4, hidden_size=64, num_attention_heads=4, num_moe_experts=4, moe_layer_freq=2
    )
    found = {
        "local": functions.get_gpt_layer_local_spec(),
        "local mla": functions.get_gpt_layer_local_spec(multi_latent_attention=True),
        "block": functions.get_gpt_decoder_block_spec(config, False, pp_rank=0),
        "moe block": functions.get_gpt_decoder_block_spec(moe, False, pp_rank=0),
        "list": functions.get_gpt_decoder_layer_specs(config, use_transformer_engine=False),
    }
    return found


def test_settings_that_are_none_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"config is 4; expected an MHCConfig, as MHCConfig\(num"):
        with_mhc(specs()["local"], 4)


@pytest.mark.parametrize("name", ["local", "local mla", "block", "moe block", "list"])
def test_with_mhc_returns_the_same_kind_and_leaves_its_argument(name: str) -> None:
    spec = specs()[name]
    before = repr(spec)
    wide = with_mhc(spec, MHCConfig(num_streams=2))
    assert repr(spec) == before
    assert type(wide) is type(spec)
    layers = wide if isinstance(wide, list) else getattr(wide, "layer_specs", [wide])
    assert {layer.module.__name__ for layer in layers} == {"MHCTransformerLayer"}
    assert all(layer.params["mhc"].num_streams == 2 for layer in layers)


def test_specs_that_mhc_refuses() -> None:
    from megatron.core.transformer.identity_op import IdentityOp

    def own_residual(training: bool, fused: bool) -> None: ...

    spec = specs()["local"]
    with pytest.raises(ValueError, match="has mHC already: call with_mhc once"):
        with_mhc(with_mhc(spec))
    other = copy.deepcopy(spec)
    other.submodules.mlp_bda = own_residual
    with pytest.raises(ValueError, match=r"residual slot mlp_bda holds .*own_residual"):
        with_mhc(other)
    other = copy.deepcopy(spec)
    other.submodules.cross_attention = own_residual
    with pytest.raises(ValueError, match="cross attention, for which mHC has no site"):
        with_mhc(other)
    other = copy.deepcopy(spec)
    other.module = IdentityOp
    with pytest.raises(ValueError, match=r"needs a TransformerLayer and the spec has .*IdentityOp"):
        with_mhc(other)
    with pytest.raises(ValueError, match="call a spec function before with_mhc"):
        with_mhc(specs)


def hybrid_spec() -> Any:
    """Megatron's spec of a HybridStack."""
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    spec = copy.copy(hybrid_stack_spec)
    spec.submodules = copy.copy(spec.submodules)
    return spec


def test_with_mhc_gives_every_kind_of_a_stacks_layers_a_class() -> None:
    spec = hybrid_spec()
    before = repr(spec)
    for wide in (with_mhc(spec).submodules, with_mhc(spec.submodules)):
        kinds = {name: kind for name, kind in vars(wide).items() if name.endswith("_layer")}
        assert kinds and all(kind.module.__name__.startswith("MHC") for kind in kinds.values())
        assert wide.mamba_layer.module.__name__ == "MHCMambaLayer"
        assert wide.mtp_block_spec is spec.submodules.mtp_block_spec
    assert repr(spec) == before
    assert type(with_mhc(spec)) is type(spec)


def test_stack_specs_that_mhc_refuses() -> None:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    with pytest.raises(ValueError, match="HybridStack has no layer to give mHC to"):
        with_mhc(ModuleSpec(module=HybridStack, submodules=HybridStackSubmodules()))
    with pytest.raises(ValueError, match="has mHC already: call with_mhc once"):
        with_mhc(with_mhc(hybrid_spec()))
    whole = hybrid_spec()
    whole.submodules.attention_layer = specs()["local"]
    message = "has one sublayer, and the spec of TransformerLayer fills self_attn_bda and mlp_bda"
    with pytest.raises(ValueError, match=message):
        with_mhc(whole)
    with pytest.raises(ValueError, match="a MambaLayer in a HybridStack alone"):
        with_mhc([hybrid_spec().submodules.mamba_layer])
