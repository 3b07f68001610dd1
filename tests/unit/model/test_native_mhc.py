"""Megatron's own mHC beside ours: every switch and setting of it is refused and named."""

import argparse
import dataclasses

import pytest

from megatron_mhc import MHCConfig
from megatron_mhc.model import native_mhc
from megatron_mhc.model.compatibility import check_transformer_config
from megatron_mhc.model.native_mhc import NATIVE_CONFLICTS, OURS, SHARED, SWITCHES
from megatron_mhc.start.settings import SETTINGS, flag_of


@pytest.mark.parametrize(("name", "flag"), SWITCHES.items())
def test_a_native_switch_is_refused_in_one_sentence(name: str, flag: str) -> None:
    for off in (False, None, 0):
        check_transformer_config(argparse.Namespace(**{name: off}), MHCConfig())
        assert not native_mhc.is_on(argparse.Namespace(**{name: off}))
    on = argparse.Namespace(**{name: 3 if name == "wide_residual" else True})
    assert native_mhc.is_on(on)
    with pytest.raises(ValueError) as error:
        check_transformer_config(on, MHCConfig())
    assert str(error.value) == (
        f"mHC does not work with these settings: {flag}: Megatron's own residual streams are on"
        " beside --mhc; drop one of the two flags"
    )


@pytest.mark.parametrize(("name", "ours"), OURS.items())
def test_a_native_setting_is_refused_and_ours_is_named(
    name: str, ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the command line gives what is the native default."""
    says = f"it sets Megatron's own mHC up and not --mhc; use {ours}"
    with pytest.raises(ValueError, match=says):
        check_transformer_config(argparse.Namespace(**{name: 7}), MHCConfig())
    flag = "--" + name.replace("_", "-")
    monkeypatch.setattr("sys.argv", ["train.py", "--mhc", f"{flag}=4"])
    with pytest.raises(ValueError, match=f"{flag}: {says}"):
        check_transformer_config(argparse.Namespace(), MHCConfig())
    assert ours in {flag_of(field) for field in SETTINGS}


def test_a_shared_setting_that_ours_does_not_follow_is_refused() -> None:
    """A library's TransformerConfig says 3, and the sites would take MHCConfig's number."""
    native = argparse.Namespace(mhc_sinkhorn_iterations=3)
    for ours in (None, MHCConfig(), MHCConfig(sinkhorn_iterations=5)):
        with pytest.raises(
            ValueError, match=r"mhc_sinkhorn_iterations: .* give MHCConfig sinkhorn"
        ):
            check_transformer_config(native, ours)
    check_transformer_config(native, MHCConfig(sinkhorn_iterations=3))
    untouched = argparse.Namespace(mhc_sinkhorn_iterations=20)  # the native default
    check_transformer_config(untouched, MHCConfig(sinkhorn_iterations=5))


def test_native_recompute_is_refused() -> None:
    plain = argparse.Namespace(recompute_modules=["core_attn"])
    check_transformer_config(plain, MHCConfig())
    with pytest.raises(ValueError, match="--recompute-modules mhc: it recomputes Megatron's own"):
        check_transformer_config(argparse.Namespace(recompute_modules=["mhc"]), MHCConfig())


def test_a_plain_configuration_of_this_megatron_has_none_of_it() -> None:
    """Whatever it has natively stands at its default."""
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    assert not [conflict.flag for conflict in NATIVE_CONFLICTS if conflict.given(config)]
    check_transformer_config(config, MHCConfig())


def native_fields() -> set[str]:
    """What this Megatron calls the settings of its own mHC."""
    from megatron.core.transformer import TransformerConfig

    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    return {n for n in names if "mhc" in n or "hyper" in n or "residual_stream" in n}


@pytest.mark.skipif(not native_fields(), reason="this Megatron has no mHC of its own: `test-main`")
def test_every_native_name_is_known() -> None:
    """A switch or setting that a new Megatron adds is to be refused too, or shared."""
    shared = {f"mhc_{name}" for name in SHARED}
    assert native_fields() <= SWITCHES.keys() | OURS.keys() | shared
