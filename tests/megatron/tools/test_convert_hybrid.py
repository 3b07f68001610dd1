"""`convert --hybrid-layer-pattern`: a GPT with mHC goes on as the HybridModel of its halves."""

import functools
import shutil
from pathlib import Path

import pytest

from megatron_mhc.patches.supported_versions import is_installed
from megatron_mhc.tools.convert_hybrid import convert_to_hybrid
from megatron_mhc.tools.new_checkpoint import ConvertError
from megatron_mhc.tools.site_items import sites_of
from tests.megatron.common.converting import ORDINARY, command, ordinary
from tests.megatron.common.flags import (
    HYBRID_SCRIPT,
    HYBRID_SPEC,
    MOE,
    RESUMED,
    ROPE,
    SCRIPT,
    losses,
)
from tests.megatron.common.launch import forked_run

FP32 = [*(flag for flag in RESUMED if flag != "--bf16"), *ROPE]
FP32 += ["--make-vocab-size-divisible-by", "32"]  # the same size whatever the layout
TENSOR = ["--tensor-model-parallel-size", "2"]
EXPERTS = [*MOE, "--disable-bias-linear"]
# name: the GPT's processes and layout, flags of both, the pattern
CASES: dict[str, tuple[int, list[str], list[str], str]] = {
    "dense": (2, TENSOR, [], "*-*-"),
    "learned head, two stages": (
        2,
        ["--pipeline-model-parallel-size", "2"],
        ["--mhc-convention", "deepseek_v4", "--mhc-num-streams", "2"],
        "*-*-",
    ),
    "experts": (
        2,
        ["--expert-model-parallel-size", "2", "--use-distributed-optimizer"],
        EXPERTS,
        "*E*E",
    ),
    # layers that differ have a key each, not one for their stack
    "experts in one layer": (1, [], [*EXPERTS, "--moe-layer-freq", "[0,1]"], "*-*E"),
    "multi-token prediction": (1, [], ["--mtp-num-layers", "1"], "*-*-/*-"),
}
if is_installed("<0.19"):
    del CASES["multi-token prediction"]  # refused there


@functools.cache
def trained(case: str, folder: Path) -> Path:
    """The checkpoint of a GPT with mHC after three iterations."""
    processes, layout, flags, _ = CASES[case]
    save = ["--save", str(folder / f"gpt {case}"), "--save-interval", "3", "--exit-interval", "3"]
    status, printed = forked_run(processes, SCRIPT, *FP32, *layout, *flags, *save)
    assert status == 0, printed[-3000:]
    return folder / f"gpt {case}"


def go_on(script: str, *flags: str) -> list[str]:
    """The losses of a run in one process that starts with a new optimizer."""
    status, printed = forked_run(1, script, *FP32, *flags)
    assert status == 0, printed[-3000:]
    return losses(printed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's checkpoints are."""
    return tmp_path_factory.mktemp("convert-hybrid")


@pytest.mark.parametrize("case", CASES)
def test_the_hybrid_model_goes_on_digit_for_digit(
    case: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, _, flags, pattern = CASES[case]
    source, start = trained(case, folder), folder / f"{case} as a hybrid model"
    command(monkeypatch, source, start, "--hybrid-layer-pattern", pattern)
    assert f"--hybrid-layer-pattern={pattern} --load {start}" in capsys.readouterr().out
    kept = [f for f in flags if f not in ("--moe-layer-freq", "[0,1]", "--mtp-num-layers")]
    kept = [flag for flag in kept if not (flag == "1" and "multi-token" in case)]
    hybrid = [*HYBRID_SPEC, f"--hybrid-layer-pattern={pattern}", *kept]
    got = go_on(HYBRID_SCRIPT, *hybrid, "--load", str(start))
    assert got == go_on(SCRIPT, *flags, "--load", str(source), "--finetune")
    assert got != go_on(SCRIPT, *flags), "it loads nothing"


REFUSED = {
    "*-*E|M": "the pattern must be of such pairs",
    "*-": "has 2 layers and 0 depths of multi-token prediction; the checkpoint's 2 layers are 4",
    "*-*-/*-": "has 4 layers and 1 depths",
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_another_models_pattern_is_refused(pattern: str, folder: Path) -> None:
    with pytest.raises(ConvertError, match=REFUSED[pattern].replace("*", r"\*")):
        convert_to_hybrid(trained("dense", folder), folder / "refused", pattern)
    assert not (folder / "refused").exists()


def test_what_has_no_mhc_or_is_hybrid_already_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConvertError, match="has no mHC in it: convert it to a start with mHC"):
        convert_to_hybrid(ordinary("dense", folder), folder / "refused", "*-*-")
    made = convert_to_hybrid(trained("dense", folder), folder / "once", "*-*-")
    with pytest.raises(ConvertError, match="is of a HybridModel already"):
        convert_to_hybrid(made, folder / "refused", "*-*-")
    given = ["--hybrid-layer-pattern", "*-*-", "--mhc-num-streams", "4"]
    with pytest.raises(SystemExit, match="--mhc-num-streams beside --hybrid-layer-pattern"):
        command(monkeypatch, made, folder / "refused", *given)
    for goal in ("megatron", "hf"):  # whose layers have two sites
        with pytest.raises(SystemExit, match=rf"^convert: .* a HybridModel.*: --to {goal} takes"):
            command(monkeypatch, "--to", goal, made, folder / "refused")


@pytest.mark.skipif(is_installed("<0.19"), reason="Megatron 0.18 does not read one as the other")
def test_megatrons_own_way_is_told_to_convert(folder: Path) -> None:
    hybrid = [*HYBRID_SPEC, "--hybrid-layer-pattern", "*-*-"]
    for source in (trained("dense", folder), ordinary("dense", folder)):
        load = ["--load", str(source), "--finetune"]
        status, printed = forked_run(1, HYBRID_SCRIPT, *FP32, *hybrid, *load)
        assert status != 0 and not losses(printed)
        assert "a HybridModel with mHC: convert it (python -m megatron_mhc convert" in printed


def test_a_file_that_is_cut_or_missing_is_named(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "cut"
    shutil.copytree(trained("dense", folder), source)
    file = next(source.glob("iter_*/__1_0.distcp"))  # the other rank's has the common state
    file.write_bytes(file.read_bytes()[:10])
    for message in (
        "__1_0.distcp ends in the middle of .*: copy it",
        "__1_0.distcp.: copy it again",
    ):
        with pytest.raises(ConvertError, match=message):
            convert_to_hybrid(source, tmp_path / "refused", "*-*-")
        file.unlink(missing_ok=True)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("convention", ["paper", "deepseek_v4"])
def test_an_ordinary_hybrid_model_is_a_start_too(
    convention: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer gets the site of its one sublayer; the keys that were there stay."""
    source, start = folder / f"ordinary hybrid {convention}", folder / f"start {convention}"
    save = ["--save", str(source), "--save-interval", "3", "--exit-interval", "3"]
    hybrid = [*HYBRID_SPEC, "--hybrid-layer-pattern", "*-E*", *EXPERTS, *ROPE]
    status, printed = forked_run(1, HYBRID_SCRIPT, *ORDINARY, *hybrid, *save)
    assert status == 0, printed[-3000:]
    command(monkeypatch, source, start, "--mhc-convention", convention)

    def first_loss(*flags: str) -> float:
        status, printed = forked_run(1, HYBRID_SCRIPT, *ORDINARY, *hybrid, *flags)
        assert status == 0, printed[-3000:]
        return float(losses(printed)[0])

    wide = first_loss("--load", str(start), "--mhc", "--mhc-convention", convention)
    # a unit or two of what is printed; the convention's eps is 1e-6, at four sites
    assert wide == pytest.approx(first_loss("--load", str(source), "--finetune"), rel=1e-5)
    assert wide != pytest.approx(first_loss(), rel=1e-2), "it loads nothing"


def test_sites_are_called_after_the_sublayers_that_are_there() -> None:
    keys = ["decoder.final_norm.weight", "decoder.layers.2.mlp.linear_fc1.weight"]
    keys += ["decoder.layers.0.mixer.in_proj.weight", "decoder.layers.1.self_attention.x.weight"]
    keys += ["decoder.layers.2.mlp.linear_fc2.weight", "decoder.layers.1.input_layernorm.weight"]
    found = [(0, "mamba_connection"), (1, "attention_connection"), (2, "mlp_connection")]
    assert sites_of(keys, 3) == found
    halves = ["attention_connection", "mlp_connection"]
    assert sites_of(keys[1:], 2) == [(layer, half) for layer in (0, 1) for half in halves]
