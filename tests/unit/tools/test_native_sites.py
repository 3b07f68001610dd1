"""What a checkpoint with Megatron's own mHC says of itself, and what has no counterpart."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_mhc import MHCConfig
from megatron_mhc.tools.convert_native import check_back
from megatron_mhc.tools.native_sites import AUGUST, DEV, check_native, generation, settings
from megatron_mhc.tools.new_checkpoint import ConvertError

SITE = "decoder.layers.self_attention_hyper_connection.bias"
FOLDER = Path("runs/native")


@pytest.mark.parametrize(
    ("keys", "args", "message"),
    [
        ([SITE, "decoder.layers.0.hyper_connection.bias"], {}, "is of a HybridModel"),
        ([SITE, "mtp.layers.0.e_proj.weight"], {}, "layers for multi-token prediction .mtp.layers"),
        ([SITE], {"mhc_single_pass": True}, "trained with --mhc-single-pass"),
        (["decoder.layers.mlp.linear_fc1.weight"], {}, "has nothing of Megatron's own mHC"),
    ],
)
def test_what_has_no_counterpart_is_refused(
    keys: list[str], args: dict[str, object], message: str
) -> None:
    with pytest.raises(ConvertError, match=f"^runs/native .*{message}"):
        check_native(FOLDER, dict.fromkeys(keys), Namespace(**args))
    check_native(FOLDER, {SITE: None}, None)


@pytest.mark.parametrize(
    ("which", "key", "message"),
    [
        (DEV, "mtp.layers.0.transformer_layer.mlp_connection.phi", "has multi-token prediction"),
        (DEV, "decoder.final_norm.weight", "has a HybridModel"),
        (AUGUST, "decoder.layers.mlp.router.weight", "has layers with experts"),
    ],
)
def test_what_megatron_has_no_place_for_is_refused(which: str, key: str, message: str) -> None:
    with pytest.raises(ConvertError, match=f"^runs/native {message}"):
        check_back(FOLDER, {key: None}, which)
    check_back(FOLDER, {"decoder.layers.mlp.linear_fc1.weight": None}, which)


def test_the_generation_that_computes_it() -> None:
    for given, which in (
        ({"convention": "megatron_main_2026_08"}, AUGUST),
        (
            {"convention": "paper", "norm_form": "outside_root", "sinkhorn_order": "rows_first"},
            AUGUST,
        ),
        ({"convention": "megatron_dev"}, DEV),
        ({"convention": "megatron_dev", "end": "mean"}, DEV),
        ({"convention": "megatron_dev", "head_eps": 1e-3}, DEV),
    ):
        assert generation(MHCConfig(**given)) == which
    for given, differs in (
        ({"convention": "paper"}, "norm_form .outside_root., sinkhorn_order .rows_first."),
        ({"convention": "deepseek_v4"}, "megatron_dev differs in norm_form .outside_root."),
        ({"convention": "megatron_dev", "norm_eps": 1e-5}, "differs in norm_eps .1e-06."),
        ({"convention": "megatron_main_2026_08", "end": "last_pre", "delayed": True}, "delayed"),
        ({"variant": "hc"}, "variant hc"),
    ):
        with pytest.raises(ConvertError, match=differs):
            generation(MHCConfig(**given))


def test_eps_of_the_head_is_that_of_the_models_norms() -> None:
    keys = {SITE: None, "decoder.hc_head_fn": None}
    for name in ("layernorm_epsilon", "norm_epsilon"):
        args = Namespace(mhc_sinkhorn_iterations=20, **{name: 3e-6})
        mhc, _ = settings(FOLDER, keys, args, {}, 4)
        assert mhc == MHCConfig(convention="megatron_dev", head_eps=3e-6)
