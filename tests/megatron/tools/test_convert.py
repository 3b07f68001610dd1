"""`convert`: an ordinary checkpoint goes on as a model with mHC; and what a checkpoint refuses."""

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mhc import MHCConfig
from megatron_mhc.__main__ import main
from megatron_mhc.model.stored_settings import CheckpointSettingsError, StoredSettings
from megatron_mhc.patches.releases import is_installed
from megatron_mhc.tools.convert import convert
from tests.megatron.common.launch import ROOT, forked_run
from tests.megatron.patches.test_checkpoint import FLAGS, MOE

ORDINARY = [
    *(flag for flag in FLAGS if flag not in ("--mhc", "--bf16")),
    *("--make-vocab-size-divisible-by", "32"),  # the same size whatever the layout
]
SCRIPT = "examples/pretrain_gpt.py"
# two processes write two files; layers that differ have a key each, not one for their stack
MODELS: dict[str, tuple[int, list[str]]] = {
    "dense": (2, ["--tensor-model-parallel-size", "2"]),
    "moe": (
        2,
        [
            *(*MOE, "--disable-bias-linear", "--moe-layer-freq", "[0,1]"),
            *("--expert-model-parallel-size", "2", "--use-distributed-optimizer"),
        ],
    ),
}


HEAD: dict[str, Any] = {"convention": "deepseek_v4"}


def losses(printed: str) -> list[float]:
    """What Megatron logs."""
    lines = [line for line in printed.splitlines() if "lm loss: " in line]
    return [float(line.split("lm loss: ")[1].split(" |")[0]) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's checkpoints are."""
    return tmp_path_factory.mktemp("convert")


@functools.cache
def ordinary(model: str, folder: Path) -> Path:
    """The checkpoint of an ordinary model after three iterations."""
    processes, flags = MODELS[model]
    save = ["--save", str(folder / model), "--save-interval", "3", "--exit-interval", "3"]
    status, printed = forked_run(processes, SCRIPT, *ORDINARY, *flags, *save)
    assert status == 0, printed[-3000:]
    return folder / model


def go_on(model: str, load: Path, *flags: str) -> list[float]:
    """The losses of a run that starts from a checkpoint with a new optimizer."""
    processes, layout = MODELS[model]
    if model == "dense":  # resharded, to one process
        processes, layout = 1, []
    status, printed = forked_run(processes, SCRIPT, *ORDINARY, *layout, "--load", str(load), *flags)
    assert status == 0, printed[-3000:]
    return losses(printed)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """`python -m megatron_mhc convert`, in this process."""
    monkeypatch.setattr(sys, "argv", ["megatron_mhc", "convert", *map(str, arguments)])
    main()


@pytest.mark.parametrize(
    ("model", "convention", "bound"),
    # one or two units of what is printed; the convention's eps is 1e-6, at four sites
    [("dense", "paper", 1e-6), ("moe", "deepseek_v4", 1e-5)],
)
def test_a_converted_model_starts_where_the_ordinary_one_is(
    model: str,
    convention: str,
    bound: float,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, start = ordinary(model, folder), folder / f"{model} with mHC"
    command(monkeypatch, source, start, "--mhc-convention", convention)
    printed = capsys.readouterr().out
    assert "convert: copied 0.00 of 0.00 GiB" in printed
    flags = printed.split("train with ")[1].split(" --load")[0].split()
    assert flags == ["--mhc", *(["--mhc-convention", convention] if model == "moe" else [])]
    wide = go_on(model, start, *flags)
    narrow = go_on(model, source, "--finetune")
    assert wide[0] == pytest.approx(narrow[0], rel=bound)
    assert wide[0] != pytest.approx(go_on(model, folder / "none")[0], rel=1e-2), "it loads nothing"
    assert len(wide) == 7 and wide[-1] < wide[1] and wide[-1] != narrow[-1]


def parameters_of_mhc(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The sites' and the head's parameters, whole, by the checkpoint's keys."""
    keys = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(value.size)
        for key, value in keys.items()
        if isinstance(value, TensorStorageMetadata)
        and key.startswith("decoder.layers.")
        and ("connection." in key or ".head." in key)
    }
    load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


@pytest.mark.parametrize("model", MODELS)
def test_the_new_parameters_are_those_of_a_new_model(model: str, folder: Path) -> None:
    """Home streams too, which the first loss does not tell apart."""
    made = convert(ordinary(model, folder), folder / f"{model} start", MHCConfig(**HEAD))
    processes, layout = MODELS[model]
    # one step that changes nothing: mHC's parameters have no weight decay
    new = ["--save", str(folder / f"{model} new"), "--train-iters", "1", "--lr", "0"]
    flags = ["--mhc", "--mhc-convention", HEAD["convention"], "--save-interval", "1", *new]
    status, printed = forked_run(processes, SCRIPT, *ORDINARY, *layout, *flags)
    assert status == 0, printed[-3000:]
    want = parameters_of_mhc(folder / f"{model} new" / "iter_0000001")
    got = parameters_of_mhc(made)
    assert got.keys() == want.keys() and len(got) == (9 if model == "dense" else 15)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_convert_refuses_in_a_sentence_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = ordinary("dense", folder), folder / "target"
    (folder / "there").mkdir()
    cut = shutil.copytree(source, folder / "cut")
    data = cut / "iter_0000003" / "__1_0.distcp"
    data.write_bytes(data.read_bytes()[:1000])
    before = {with_mhc(folder), *folder.iterdir()}
    for arguments, message in (
        ((source, folder / "there"), "is there already"),
        ((folder, target), "is no torch_dist checkpoint"),
        ((with_mhc(folder), target), "with mHC already"),
        ((cut, target), "ends in the middle of"),
        ((source, target, "--mhc-num-streams", "0"), "num_streams is 0"),
    ):
        with pytest.raises(SystemExit, match=f"^convert: .*{message}"):
            command(monkeypatch, *arguments)
        assert set(folder.iterdir()) == before


def _cut(file: Path) -> None:
    """Cut a file short, as a full disk does; what convert leaves out is behind the first 1000."""
    file.write_bytes(file.read_bytes()[: min(1000, file.stat().st_size // 2)])


LAST = "latest_checkpointed_iteration.txt"
WHAT_TO_DO = "copy it again from where it was saved, or give the folder of an earlier iteration"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "tracker empty": (
        lambda source: (source / LAST).write_text("\n"),
        f"SOURCE/{LAST} is empty, not the number of an iteration (or 'release'): write the last"
        " saved iteration's number into it, or give that iteration's folder",
    ),
    "tracker no number": (
        lambda source: (source / LAST).write_text("iter_0000003"),
        f"SOURCE/{LAST} says 'iter_0000003', not the number of an iteration (or 'release'): write"
        " the last saved iteration's number into it, or give that iteration's folder",
    ),
    "tracker no text": (
        lambda source: (source / LAST).write_bytes(b"\xff\x80"),
        f"SOURCE/{LAST} says '\ufffd\ufffd', not the number of an iteration (or 'release'): write"
        " the last saved iteration's number into it, or give that iteration's folder",
    ),
    "iteration missing": (
        lambda source: (source / LAST).write_text("12"),
        f"SOURCE/{LAST} says 12, and there is no folder SOURCE/iter_0000012: bring it back, or give"
        " the folder of an iteration that is there",
    ),
    "source missing": (
        shutil.rmtree,
        "there is no folder SOURCE: give one that --save wrote to",
    ),
    "metadata missing": (
        lambda source: (source / "iter_0000003" / ".metadata").unlink(),
        f"SOURCE/iter_0000003/.metadata is missing, so the folder is not whole: {WHAT_TO_DO}",
    ),
    "metadata empty": (
        lambda source: (source / "iter_0000003" / ".metadata").write_bytes(b""),
        "SOURCE/iter_0000003/.metadata cannot be read (Ran out of input), so it is cut off or"
        f" damaged: {WHAT_TO_DO}",
    ),
    "metadata cut": (
        lambda source: _cut(source / "iter_0000003" / ".metadata"),
        "SOURCE/iter_0000003/.metadata cannot be read (pickle data was truncated), so it is cut off"
        f" or damaged: {WHAT_TO_DO}",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_checkpoint_is_refused_in_a_sentence(
    broken: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which file, why, and what to do; and the target's parents are not left behind either."""
    source = shutil.copytree(ordinary("dense", folder), tmp_path / "source")
    spoil, message = BROKEN[broken]
    spoil(source)
    before = {file: file.stat().st_size for file in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as refused:
        command(monkeypatch, source, tmp_path / "new" / "target")
    assert refused.value.code == f"convert: {message}".replace("SOURCE", str(source))
    assert {file: file.stat().st_size for file in tmp_path.rglob("*")} == before


FILES = ["__0_0.distcp", "__1_0.distcp", "metadata.json"]
if is_installed("<0.19"):
    FILES.append("common.pt")


@pytest.mark.parametrize("harm", [_cut, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_any_other_broken_file_is_refused_in_a_sentence(
    name: str,
    harm: Callable[[Path], None],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch, pickle and Megatron raise of it differs; none of it reaches the user whole."""
    source = shutil.copytree(ordinary("dense", folder), tmp_path / "source")
    file = source / "iter_0000003" / name
    harm(file)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as refused:
        command(monkeypatch, source, tmp_path / "new" / "target")
    message = str(refused.value.code)
    assert message.startswith("convert: ") and str(file.parent) in message
    assert "\n" not in message, message
    # without metadata.json it may be of another format
    assert message.endswith(WHAT_TO_DO) or "must be saved anew" in message, message
    assert set(tmp_path.rglob("*")) == before


def test_converts_help_teaches() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mhc", "convert", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    for words in ("SOURCE is only read", "--mhc-init", "--load runs/gpt-mhc/start", "iteration 0"):
        assert words in done.stdout


SPEC_SCRIPT = f"""
from megatron_mhc.patches import cpu
cpu.enter()
{(ROOT / SCRIPT).read_text()}"""


@functools.cache
def with_mhc(folder: Path) -> Path:
    """A start of a model with mHC: 4 streams, 20 iterations."""
    made = folder / "with mHC"
    convert(ordinary("dense", folder), made, MHCConfig())
    return made


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mhc", "--mhc-num-streams", "2"], "num_streams is 4 there and 2 here. Give the"),
        (["--mhc", "--mhc-sinkhorn-iterations", "3"], "--mhc-sinkhorn-iterations 20"),
        (["--mhc", "--mhc-convention", "deepseek_v4"], "convention is paper there and deepseek_v4"),
        (["--mhc", "--mhc-variant", "hc"], "variant is mhc there and hc here"),
        ([], "add --mhc --mhc-num-streams 4 --mhc-sinkhorn-iterations 20"),
    ],
)
def test_other_settings_than_the_checkpoints_are_refused(
    flags: list[str], message: str, folder: Path
) -> None:
    status, printed = forked_run(1, SCRIPT, *ORDINARY, "--load", str(with_mhc(folder)), *flags)
    assert status == 1 and "CheckpointSettingsError" in printed and message in printed


def test_an_ordinary_checkpoint_in_a_model_with_mhc_names_convert(folder: Path) -> None:
    status, printed = forked_run(
        1, SCRIPT, *ORDINARY, "--load", str(ordinary("dense", folder)), "--finetune", "--mhc"
    )
    assert status == 1 and "convert it: python -m megatron_mhc convert SOURCE TARGET" in printed


def test_the_spec_way_checks_settings_from_the_environment(folder: Path) -> None:
    (folder / "spec.py").write_text(SPEC_SCRIPT)
    command = [str(folder / "spec.py"), *ORDINARY, "--load", str(with_mhc(folder))]
    command += ["--spec", "megatron_mhc.spec", "gpt_layer_spec"]
    status, printed = forked_run(1, *command, runner=False, MHC_NUM_STREAMS="2")
    assert status == 1 and "(with --spec: MHC_NUM_STREAMS=4)" in printed
    status, printed = forked_run(1, *command, runner=False)
    assert status == 0 and len(losses(printed)) == 7, printed[-3000:]


def test_harmless_settings_may_change(folder: Path) -> None:
    flags = ["--mhc-backend", "torch", "--mhc-recompute", "1", "--mhc-init", "zero"]
    start = str(with_mhc(folder))
    want = go_on("dense", with_mhc(folder), "--mhc")
    assert go_on("dense", Path(start), "--mhc", *flags) == want


def test_what_megatron_does_where_our_code_is_not_imported(folder: Path) -> None:
    """Nothing: it leaves out what it does not know, unless it is told to look."""
    off = {"MEGATRON_MHC_PATCHES": "-checkpoint-load"}
    command = [SCRIPT, *ORDINARY, "--load", str(with_mhc(folder))]
    status, printed = forked_run(1, *command, **off)
    assert status == 0 and len(losses(printed)) == 7
    status, printed = forked_run(1, *command, "--dist-ckpt-strictness", "raise_all", **off)
    assert status == 1 and "mhc_settings" in printed


def test_torchs_own_state_dict_has_the_settings() -> None:
    state = torch.nn.ModuleDict({"a": StoredSettings(MHCConfig())}).state_dict()
    torch.nn.ModuleDict({"a": StoredSettings(MHCConfig(init="zero"))}).load_state_dict(state)
    other = torch.nn.ModuleDict({"a": StoredSettings(MHCConfig(sinkhorn_iterations=5))})
    with pytest.raises(CheckpointSettingsError, match="sinkhorn_iterations is 20 there and 5 here"):
        other.load_state_dict(state)
