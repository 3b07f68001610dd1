"""What a checkpoint with Megatron's own mHC says of itself, and what has no counterpart."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_mhc import MHCConfig
from megatron_mhc.tools.convert_native import check_back, check_gpt
from megatron_mhc.tools.native_sites import AUGUST, DEV, check_native, generation, settings
from megatron_mhc.tools.new_checkpoint import ConvertError

SITE = "decoder.layers.self_attention_hyper_connection.bias"
FOLDER = Path("runs/native")


@pytest.mark.parametrize(
    ("keys", "args", "message"),
    [
        ([SITE, "decoder.layers.0.hyper_connection.bias"], {}, "is of a HybridModel"),
        ([SITE, "mtp.layers.0.e_proj.weight"], {}, "layers for multi-token prediction .mtp.layers"),
        ([SITE], {"mhc_single_pass": True}, "trained with --mhc-single-pass .True."),
        ([SITE], {"mhc_norm_eps_inside_sqrt": True}, "trained with --mhc-norm-eps-inside-sqrt"),
        ([SITE], {"mhc_epsilon": 1e-5}, "trained with --mhc-epsilon .1e-05."),
        (["decoder.layers.mlp.linear_fc1.weight"], {}, "has nothing of Megatron's own mHC"),
    ],
)
def test_what_has_no_counterpart_is_refused(
    keys: list[str], args: dict[str, object], message: str
) -> None:
    with pytest.raises(ConvertError, match=f"^runs/native .*{message}"):
        check_native(FOLDER, dict.fromkeys(keys), Namespace(**args))
    check_native(FOLDER, {SITE: None}, None)
    check_native(FOLDER, {SITE: None}, Namespace(mhc_single_pass=False, mhc_epsilon=1e-6))


DENSE = {"decoder.layers.mlp.linear_fc1.weight": None}
EXPERTS = {"decoder.layers.mlp.router.weight": None}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("mtp.layers.0.transformer_layer.mlp_connection.phi", "has multi-token prediction"),
        ("decoder.final_norm.weight", "has a HybridModel"),
    ],
)
def test_what_megatron_has_no_place_for_is_refused(key: str, message: str) -> None:
    with pytest.raises(ConvertError, match=f"^runs/native {message}"):
        check_gpt(FOLDER, {key: None})
    check_gpt(FOLDER, DENSE)


def test_what_one_generation_has_no_place_for_is_refused() -> None:
    august, dev = MHCConfig(convention=AUGUST), MHCConfig(convention=DEV, head_eps=3e-6)
    assert check_back(FOLDER, DENSE, None, august) == AUGUST
    assert check_back(FOLDER, EXPERTS, None, dev) == DEV
    with pytest.raises(ConvertError, match=r"^runs/native has layers with experts"):
        check_back(FOLDER, EXPERTS, None, august)
    assert check_back(FOLDER, DENSE, Namespace(norm_epsilon=3e-6), dev) == DEV
    # the mean has no eps
    mean = MHCConfig(convention=DEV, end="mean")
    for mhc, which in ((august, AUGUST), (mean, DEV)):
        assert check_back(FOLDER, DENSE, Namespace(norm_epsilon=1e-5), mhc) == which
    with pytest.raises(
        ConvertError, match=r"head_eps 3e-06, and norms with 1e-05; .*--mhc-head-ep"
    ):
        check_back(FOLDER, DENSE, Namespace(norm_epsilon=1e-5), dev)


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
