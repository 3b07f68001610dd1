"""Megatron's own mHC beside the plugin: refused with --mhc, and left alone without it."""

import argparse
from pathlib import Path

import pytest

from megatron_mhc.patches.registry import is_there
from tests.megatron.common.flags import RUN, SCRIPT, SOURCE, STAND_IN, TINY, losses, training_log
from tests.megatron.common.launch import RUNNER, forked, forked_python

NATIVE_LAYER = "megatron.core.transformer.transformer_layer:HyperConnectionTransformerLayer"
pytestmark = pytest.mark.skipif(
    not is_there(NATIVE_LAYER),
    reason="this Megatron has no mHC of its own: `make test-main MEGATRON_LM=...`",
)

ON = "--enable-mhc-connections"
SPEC = """
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.hyper_connection import HyperConnectionModule
from megatron.core.transformer.transformer_layer import HyperConnectionTransformerLayer

# no spec of Megatron's builds it yet
def layer(config):
    spec = get_gpt_layer_local_spec()
    spec.module = HyperConnectionTransformerLayer
    spec.submodules.self_attention_hyper_connection = HyperConnectionModule
    spec.submodules.mlp_hyper_connection = HyperConnectionModule
    return spec
"""
NATIVE = [ON, "--mhc-sinkhorn-iterations", "5", "--spec", "native_spec", "layer", "--bf16"]


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, str]:
    """The environment in which `native_spec` is a module."""
    (tmp_path / "native_spec.py").write_text(SPEC)
    return {"PYTHONPATH": str(tmp_path)}


def test_native_mhc_trains_as_without_the_plugin(tmp_path: Path, spec: dict[str, str]) -> None:
    """Digit for digit, its gradient norms too, with every patch of ours in place."""
    script = tmp_path / "train.py"
    script.write_text(f"{STAND_IN}{SOURCE}")
    flags = [*TINY, *NATIVE, "--weight-decay", "0.1", "--log-params-norm"]
    status, alone = forked(1, str(script), *flags, stage="torch", **spec)
    status_too, beside = forked(1, *RUNNER, SCRIPT, *flags, stage="torch", **spec)
    assert status == status_too == 0, alone[-3000:] + beside[-3000:]
    log = training_log(alone)
    assert len(log) == 3 and all("grad norm: " in line for line in log)
    assert training_log(beside) == log
    ordinary = forked(1, str(script), *TINY, "--bf16", "--weight-decay", "0.1", stage="torch")
    assert losses(ordinary[1]) != losses(beside), "native mHC was not on"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([ON], f"{ON}: Megatron's own residual streams are on beside --mhc"),
        (["--mhc-num-residual-streams", "4"], "and not --mhc; use --mhc-num-streams"),
        (["--mhc-recompute-layer-num", "2"], "and not --mhc; use --mhc-recompute"),
        (["--mhc-init-gating-factor", "0.1"], "and not --mhc; use --mhc-init"),
        (
            ["--recompute-granularity", "selective", "--recompute-modules", "mhc"],
            "take mhc off the list, and use --mhc-recompute",
        ),
    ],
    ids=str,
)
def test_beside_ours_it_is_refused(flags: list[str], message: str) -> None:
    result = forked_python(*RUN, "--mhc", *flags)
    assert result.returncode != 0 and not losses(result.stdout)
    assert message in result.stdout, result.stdout[-3000:]


def test_in_a_library_it_is_refused() -> None:
    """A layer that `with_mhc` gave sites looks at the TransformerConfig that it is built with."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_mhc import with_mhc

    spec = with_mhc(get_gpt_layer_local_spec())
    config = TransformerConfig(
        num_layers=1, hidden_size=4, num_attention_heads=1, enable_mhc_connections=True
    )
    with pytest.raises(ValueError, match=f"{ON}: Megatron's own residual streams are on"):
        spec.module(config, spec.submodules, **spec.params)


def test_a_native_layer_gets_no_sites_of_ours() -> None:
    from megatron_mhc import with_mhc

    scope: dict = {}
    exec(SPEC, scope)
    with pytest.raises(ValueError, match="is a layer of Megatron's own mHC"):
        with_mhc(scope["layer"](argparse.Namespace()))


def test_the_shared_flag_sets_ours() -> None:
    result = forked_python(*RUN, "--mhc", "--mhc-sinkhorn-iterations", "7")
    assert "convention paper, 7 Sinkhorn iterations" in result.stdout, result.stdout[-3000:]
    assert len(losses(result.stdout)) == 3
    result = forked_python(*RUNNER, SCRIPT, *TINY, "--mhc-sinkhorn-iterations", "7")
    assert "--mhc-sinkhorn-iterations given without --mhc" in result.stdout
