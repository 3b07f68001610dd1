"""`convert --from megatron` and `--to megatron`: a model computes the same before and after.

The native models are those that Megatron's main of 22 August 2026 and its dev branch of the day
before built, recorded in `tests/megatron/common/native_models/` (`tiny_gpt` says how); where the
Megatron at hand has such a model, it is built too.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mhc import MHCConfig
from megatron_mhc.patches.registry import is_there
from megatron_mhc.tools.convert import read_common, read_metadata
from megatron_mhc.tools.torch_dist import read_tensors
from tests.megatron.common.converting import command, logits_of
from tests.megatron.common.flags import SCRIPT, TINY, losses
from tests.megatron.common.launch import RUNNER, forked
from tests.megatron.common.native_records import ARGUMENTS, COMMON, CONVENTIONS, record
from tests.megatron.start.test_native_mhc import NATIVE, SPEC

EQUAL = {"rtol": 2e-5, "atol": 2e-5}
"""Of fp32, whose sums go in another order in Megatron's module: logits are up to 10."""


def native(folder: Path, name: str, args: dict[str, Any] | None = None, **more: Any) -> Path:
    """A checkpoint of a recorded model, as the Megatron at hand writes it."""
    args = COMMON | ARGUMENTS[name] if args is None else args
    logits_of(kind="ordinary", record=name, save=str(folder / "native"), args=args, **more)
    return folder / "native"


def ours(folder: Path, **mhc: Any) -> Path:
    """A checkpoint with our mHC."""
    logits_of(kind="ours", mhc=mhc, save=str(folder / "ours"), args=COMMON)
    return folder / "ours"


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All of a checkpoint's, whole."""
    metadata = read_metadata(checkpoint)
    keys = [k for k, v in metadata.state_dict_metadata.items() if hasattr(v, "size")]
    return read_tensors(checkpoint, metadata, keys)


def assert_same(before: Path, after: Path) -> None:
    """The same keys, dtypes and bits."""
    wanted, got = tensors(before), tensors(after)
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        assert torch.equal(value, got[key]) and value.dtype == got[key].dtype, key


@pytest.mark.parametrize("apart", [False, True], ids=["one stack", "layers apart"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_logits_are_the_same_there_and_here_and_the_way_back_is_exact(
    name: str,
    apart: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = native(tmp_path, name, apart=apart)
    command(monkeypatch, "--from", "megatron", source, tmp_path / "ours")
    printed = capsys.readouterr().out
    assert f"convention {CONVENTIONS[name]['convention']}" in printed
    assert "4 sites mapped" in printed and "the optimizer begins anew" in printed
    made = tmp_path / "ours" / "release"
    logits = logits_of(kind="ours", mhc=CONVENTIONS[name], load=str(made), apart=apart)
    wanted = record(name)["logits"]
    torch.testing.assert_close(logits, wanted, **EQUAL)
    command(monkeypatch, "--to", "megatron", made, tmp_path / "back")
    assert_same(source, tmp_path / "back" / "release")


def test_what_the_two_generations_store_is_not_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else no comparison of logits would tell them apart; the one is taken for the other here."""
    source = native(tmp_path, "main_2026_08", COMMON)
    given = ["--mhc-convention", "megatron_dev", "--mhc-end", "mean"]
    command(monkeypatch, "--from", "megatron", *given, source, tmp_path / "ours")
    mhc = {"convention": "megatron_dev", "end": "mean", "sinkhorn_iterations": 7}
    logits = logits_of(kind="ours", mhc=mhc, load=str(tmp_path / "ours" / "release"))
    assert (logits - record("main_2026_08")["logits"]).abs().max() > 0.1


def test_main_keeps_its_sites_in_bf16_and_gets_them_back_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = COMMON | ARGUMENTS["main_2026_08"] | {"bf16": True}
    source = native(tmp_path, "main_2026_08", args, dtype="bfloat16")
    command(monkeypatch, "--from", "megatron", source, tmp_path / "ours")
    assert "torch.bfloat16 made float32" in capsys.readouterr().out
    stored = tensors(tmp_path / "ours" / "release")
    assert {v.dtype for k, v in stored.items() if "connection." in k} == {torch.float32}
    command(monkeypatch, "--to", "megatron", tmp_path / "ours", tmp_path / "back")
    assert "rounded to torch.bfloat16" in capsys.readouterr().out
    assert_same(source, tmp_path / "back" / "release")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_and_settings_go_with_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = native(tmp_path, name, COMMON | ARGUMENTS[name] | {"spec": ["native_spec", "layer"]})
    command(monkeypatch, "--from", "megatron", source, tmp_path / "ours")
    assert "no counterpart: --spec native_spec layer" in capsys.readouterr().out
    args = vars(read_common(tmp_path / "ours" / "release")["args"])
    mhc = dataclasses.asdict(MHCConfig(**CONVENTIONS[name]))
    assert args.items() >= {f"mhc_{field}": value for field, value in mhc.items()}.items()
    assert args["mhc"] and args["spec"] == ["megatron_mhc.spec", "gpt_layer_spec"]
    assert args["mhc_base_spec"] is None and not ARGUMENTS[name].keys() & args.keys()
    command(monkeypatch, "--to", "megatron", tmp_path / "ours", tmp_path / "back")
    args = vars(read_common(tmp_path / "back" / "release")["args"])
    assert args.items() >= (COMMON | ARGUMENTS[name]).items()
    named = {name for name in args if name.startswith("mhc")}
    assert named == {"mhc_sinkhorn_iterations", *ARGUMENTS[name]} & named


def test_main_from_september_is_told_by_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """V4's formulas and the mean, under the keys of August; and it goes back as what it was."""
    late = ARGUMENTS["main_2026_08"] | {"use_fused_mhc": False}
    source = native(tmp_path, "main_2026_08", COMMON | late)
    command(monkeypatch, "--from", "megatron", source, tmp_path / "ours")
    assert "its arguments have use_fused_mhc" in capsys.readouterr().out
    args = read_common(tmp_path / "ours" / "release")["args"]
    assert (args.mhc_convention, args.mhc_end) == ("megatron_dev", "mean")
    command(monkeypatch, "--to", "megatron", tmp_path / "ours", tmp_path / "back")
    assert vars(read_common(tmp_path / "back" / "release")["args"]).items() >= late.items()
    assert_same(source, tmp_path / "back" / "release")


NO_ARGS = {"mhc_sinkhorn_iterations": 7}
REFUSED_NATIVE: dict[str, tuple[str, dict[str, Any], list[str], str]] = {
    "nothing says whose": (
        "main_2026_08",
        NO_ARGS,
        [],
        "does not say which of Megatron's own mHC it has .*megatron_main_2026_08 .*megatron_dev",
    ),
    "iterations unknown": (
        "dev",
        {"norm_epsilon": 1e-4},
        [],
        "does not say how many Sinkhorn iterations it has: give --mhc-sinkhorn-iterations",
    ),
    "given another": (
        "dev",
        COMMON | ARGUMENTS["dev"],
        ["--mhc-convention", "megatron_main_2026_08", "--mhc-sinkhorn-iterations", "3"],
        "convention is megatron_dev there and megatron_main_2026_08 was given,"
        " sinkhorn_iterations is 7 there and 3 was given .*decoder.hc_head_fn.*: drop the flag",
    ),
    "single pass": (
        "main_2026_08",
        COMMON | ARGUMENTS["main_2026_08"] | {"mhc_single_pass": True},
        [],
        "was trained with --mhc-single-pass",
    ),
    "init given": ("dev", NO_ARGS, ["--mhc-init", "zero"], "--mhc-init given, and the checkpoint"),
}


@pytest.mark.parametrize("case", REFUSED_NATIVE)
def test_a_native_checkpoint_is_refused_in_a_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, args, flags, message = REFUSED_NATIVE[case]
    source = native(tmp_path, name, args)
    with pytest.raises(SystemExit, match=f"^convert: .*{message}"):
        command(monkeypatch, "--from", "megatron", source, tmp_path / "ours", *flags)
    assert {file.name for file in tmp_path.iterdir()} == {"native"}


def test_flags_that_do_not_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ours(tmp_path, convention="paper")
    target = tmp_path / "target"
    for flags, message in (
        (["--from", "megatron", "--to", "megatron"], "ours is one end of every conversion"),
        (["--to", "megatron"], "convention paper, which no mHC of Megatron's own computes: .*rows"),
        (["--to", "hf"], "convention paper; of the models of Hugging Face, deepseek_v4 ends with"),
        (["--from", "megatron"], "has nothing of Megatron's own mHC"),
        (["--from", "hf"], "--from hf without --hf FOLDER"),
        (["--hf", tmp_path], "--hf is for --from hf and --to hf"),
        (["--to", "megatron", "--mhc-num-streams", "4"], "--mhc-num-streams given, and the check"),
        (["--to", "hf", "--hybrid-layer-pattern", "*-*-"], "--hybrid-layer-pattern beside --from"),
    ):
        with pytest.raises(SystemExit, match=f"^convert: .*{message}"):
            command(monkeypatch, *flags, made, target)
        assert not target.exists()


def test_the_unconstrained_variant_is_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ours(tmp_path, variant="hc")
    for goal in ("megatron", "hf"):
        with pytest.raises(SystemExit, match="is of variant hc, which no model but ours has"):
            command(monkeypatch, "--to", goal, made, tmp_path / "target")


def test_a_native_checkpoint_is_no_ordinary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sites would be loaded by nobody, and lost without a word."""
    with pytest.raises(SystemExit, match="Megatron's own mHC: give --from megatron"):
        command(monkeypatch, native(tmp_path, "dev"), tmp_path / "target")


AUGUST = "megatron.core.transformer.hyper_connection:SinkhornKnopp._sinkhorn_normalize"


@pytest.mark.skipif(not is_there(AUGUST), reason="`make test-main MEGATRON_LM=...`, of August 2026")
def test_the_native_model_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it saves becomes ours, and what was ours it loads; with logits that are equal."""
    source, mhc = tmp_path / "native", CONVENTIONS["main_2026_08"]
    args = COMMON | ARGUMENTS["main_2026_08"]
    wanted = logits_of(kind="native", save=str(source), args=args)
    command(monkeypatch, "--from", "megatron", source, tmp_path / "ours")
    made = tmp_path / "ours" / "release"
    torch.testing.assert_close(logits_of(kind="ours", mhc=mhc, load=str(made)), wanted, **EQUAL)
    torch.testing.assert_close(wanted, record("main_2026_08")["logits"], **EQUAL)
    command(monkeypatch, "--to", "megatron", made, tmp_path / "back")
    back = logits_of(kind="native", moved=True, load=str(tmp_path / "back" / "release"))
    assert torch.equal(back, wanted)


@pytest.mark.skipif(not is_there(AUGUST), reason="`make test-main MEGATRON_LM=...`, of August 2026")
def test_a_native_training_goes_on_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own checkpoint, with the arguments that it writes; the first loss is the same."""
    (tmp_path / "native_spec.py").write_text(SPEC)
    environment = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    flags = [flag for flag in NATIVE if flag != "--bf16"]
    save = ["--save", str(tmp_path / "native"), "--save-interval", "3"]
    # native mHC drops what it has spread over the streams, ours what is spread
    dropout = ["--hidden-dropout", "0", "--attention-dropout", "0"]
    script = [*RUNNER, SCRIPT, *TINY, *dropout, "--ckpt-format", "torch_dist"]
    run = functools.partial(forked, 1, *script, stage="torch", **environment)
    status, printed = run(*flags, *save)
    assert status == 0, printed[-3000:]
    command(monkeypatch, "--from", "megatron", tmp_path / "native", tmp_path / "ours")
    ours = capsys.readouterr().out.split("train with ")[1].split(" --load")[0].split()
    assert ours[-2:] == ["--mhc-convention", "megatron_main_2026_08"]
    goes_on = [
        losses(run(*more, "--finetune", "--load", str(tmp_path / folder))[1])
        for folder, more in (("native", flags), ("ours", ours))
    ]
    assert len(goes_on[0]) == 3
    # one or two units of what is printed
    assert float(goes_on[1][0]) == pytest.approx(float(goes_on[0][0]), rel=1e-6)
