"""HybridModel: a sublayer and a site a layer, in the places that its HybridStack gives them."""

from typing import Any

import pytest

from megatron_mhc.patches.supported_versions import is_installed
from tests.megatron.common.compare import assert_same_training, relative_error
from tests.megatron.common.launch import run_scenarios
from tests.megatron.common.settings import DELAYED, HEAD

START: dict[str, Any] = {"perturb": False, "sinkhorn_iterations": 20}
START |= {"steps": 8, "optimizer": {"lr": 3e-3}}
HAS_MLA = not is_installed("<0.19")
PATTERNS = {
    "attention, MLP": ("*-*-", "dense"),
    "experts": ("*E*E", "moe"),
    "Mamba, gated delta net": ("M-*G-", "dense"),
    "an MLP first, attention last": ("-M*", "dense"),
    **({"latent attention": ("+-+E", "mla moe")} if HAS_MLA else {}),
}
EQUAL: dict[str, dict[str, Any]] = {
    "mhc": {},
    "learned head": {"mhc": HEAD},
    "hc": {"mhc": {"variant": "hc"}},
    "delayed sites": {"mhc": DELAYED},
    "experts": {"kind": "moe"},
    "dropout": {"config": {"hidden_dropout": 0.1, "attention_dropout": 0.1}},
    "bf16": {"bf16": True},
    "recompute": {"mhc": {"recompute": 1}},
}
TWO_LAYERS = {"num_layers": 2}
ONE_AHEAD = {"mtp_num_layers": 1}
DROPPED = {"first two": [0, 1], "middle two": [2, 3], "last two": [4, 5]}
MTP_PATTERNS = {
    "one depth": ("*-*-/*-", 1),
    "two depths": ("*-*-/*-/*-", 2),
    # a stack inside is longer than the decoder: the last number says nothing about the end
    "longer than the decoder": ("*-/*-*-", 1),
    "ends in attention": ("-*/-M*", 1),
}
if HAS_MLA:  # multi-token prediction is refused with 0.18
    EQUAL["multi-token prediction"] = {"config": ONE_AHEAD}
    EQUAL["multi-token prediction, head, recompute"] = {
        "config": ONE_AHEAD,
        "mhc": {**HEAD, "recompute": 9},
    }
    # home streams go on behind the decoder's: six sites of four streams
    EQUAL["multi-token prediction, from the start"] = {
        "config": ONE_AHEAD | {"num_layers": 3},
        "perturb": False,
    }


def scenarios() -> dict[str, dict[str, Any]]:
    """Every pattern, ordinary and with mHC; GPTs of two layers and the hybrid models that equal."""
    found: dict[str, dict[str, Any]] = {}
    for name, (pattern, kind) in PATTERNS.items():
        settings = {**START, "pattern": pattern, "kind": kind}
        found[name] = {**settings, "steps": 1, "mhc": None}
        found[f"{name} mhc"] = settings
    for name, settings in EQUAL.items():
        config = TWO_LAYERS | settings.get("config", {})
        found[f"gpt {name}"] = {**settings, "config": config}
        pattern = ("*E" if settings.get("kind") == "moe" else "*-") * config["num_layers"]
        pattern += "/*-" * config.get("mtp_num_layers", 0)
        own = {k: v for k, v in settings.get("config", {}).items() if k != "num_layers"}
        found[f"hybrid {name}"] = {**settings, "pattern": pattern, "config": own}
    # a block of one GPT layer is a block of two hybrid ones
    found["hybrid recompute"]["mhc"] = {"recompute": 2}
    found["decoding"] = {"pattern": "*-*-", "decode": True}
    found["decoding, experts"] = {"pattern": "*E*-", "kind": "moe", "decode": True, "mhc": HEAD}
    for end, drop in DROPPED.items():
        found[f"without its {end}"] = {"pattern": "*-*-*-", "drop": drop}
    for name, (pattern, depths) in MTP_PATTERNS.items() if HAS_MLA else ():
        mtp = {**START, "pattern": pattern, "config": {"mtp_num_layers": depths}, "steps": 2}
        found[name] = {**mtp, "mhc": None}
        found[f"{name} mhc"] = {**mtp, "mhc": HEAD}
    return found


# one rounding a site of weights that sum to one in fp32, as for a GPT (`test_start.SAME_START`)
SAME_START = 3e-7


@pytest.mark.parametrize("name", PATTERNS)
def test_it_starts_as_the_ordinary_model(name: str) -> None:
    results = run_scenarios(1, scenarios())
    ordinary, wide = results[name], results[f"{name} mhc"]
    assert wide["losses"][0] == pytest.approx(ordinary["losses"][0], rel=SAME_START)
    # two batches in turn are on the way to being learnt by heart
    assert wide["losses"][-1] < wide["losses"][0] - 1, "it does not train"


@pytest.mark.parametrize("name", EQUAL)
def test_pairs_of_layers_are_a_gpt_bit_for_bit(name: str) -> None:
    results = run_scenarios(1, scenarios())
    assert_same_training(results[f"hybrid {name}"], results[f"gpt {name}"], bound=None)


@pytest.mark.parametrize("kind", ["decoding", "decoding, experts"])
def test_decoding_with_a_cache_gives_the_logits_of_a_whole_forward(kind: str) -> None:
    logits = run_scenarios(1, scenarios())[kind]["decoded"]
    # as for a GPT: attention of one row instead of many, through 4 layers; 4e-7 is seen
    assert relative_error(logits["cached"], logits["whole"]) < 3e-6
    assert logits["whole"].std() > 0.1


@pytest.mark.parametrize("end", DROPPED)
def test_layers_may_be_dropped(end: str) -> None:
    """As tools for compression do: the bits of a model built so short."""
    results = run_scenarios(1, scenarios())
    assert_same_training(results[f"without its {end}"], results["hybrid mhc"], bound=None)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_checkpoint_only_gains_names(name: str) -> None:
    results = run_scenarios(1, scenarios())
    ordinary, wide = results[name]["parameters"], results[f"{name} mhc"]["parameters"]
    assert ordinary.keys() < wide.keys()
    gained = {key.split(".")[-2] for key in wide.keys() - ordinary.keys()}
    assert gained <= {"attention_connection", "mlp_connection", "mamba_connection"}
    assert len(wide.keys() - ordinary.keys()) == 3 * len(PATTERNS[name][0])


@pytest.mark.parametrize("name", PATTERNS)
def test_every_site_gets_a_gradient_from_the_second_step_on(name: str) -> None:
    result = run_scenarios(1, scenarios())[f"{name} mhc"]
    gradients = result["gradients"][1]
    assert len(gradients) == 3 * len(PATTERNS[name][0])
    assert not [key for key, gradient in gradients.items() if gradient.norm() == 0]
    assert result["linked"] and all(result["linked"])


@pytest.mark.skipif(not HAS_MLA, reason="MTP is refused with Megatron 0.18")
@pytest.mark.parametrize("name", MTP_PATTERNS)
def test_stacks_inside_multi_token_prediction_have_ends_of_their_own(name: str) -> None:
    results = run_scenarios(1, scenarios())
    ordinary, wide = results[name], results[f"{name} mhc"]
    # the eps of the convention, as in `test_start.test_deepseek_v4_starts_within_its_eps`
    for losses in ("losses", "mtp_losses"):
        assert wide[losses][0] == pytest.approx(ordinary[losses][0], rel=1e-6)
    pattern, depths = MTP_PATTERNS[name]
    main, mtp, *_ = pattern.split("/")
    gradients = wide["gradients"][1]
    heads = {key.rsplit(".", 1)[0] for key in gradients if ".head." in key}
    # one each, in the last layer; a parameter that nothing reaches has no gradient
    ends = {f"decoder.layers.{len(main) - 1}.head"}
    ends |= {
        f"mtp.layers.{depth}.mtp_model_layer.layers.{len(mtp) - 1}.head" for depth in range(depths)
    }
    assert heads == ends
    assert len(gradients) == 3 * (len(main) + depths * len(mtp) + 1 + depths)
    assert not [key for key, gradient in gradients.items() if gradient.norm() == 0]
