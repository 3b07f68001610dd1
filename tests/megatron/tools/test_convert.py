"""`convert`: an ordinary checkpoint goes on as a model with mHC."""

import os
import pty
import re
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mhc import MHCConfig
from megatron_mhc.tools.convert import convert, find_checkpoint, read_metadata
from tests.megatron.common.converting import MODELS, ORDINARY, command, go_on, ordinary, with_mhc
from tests.megatron.common.flags import SCRIPT
from tests.megatron.common.launch import forked_python, forked_run, forking_python, quiet

HEAD: dict[str, Any] = {"convention": "deepseek_v4"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's checkpoints are."""
    return tmp_path_factory.mktemp("convert")


@pytest.mark.parametrize(
    ("model", "convention", "bound"),
    # one or two units of what is printed; the convention's eps is 1e-6, at four sites
    [("dense", "paper", 1e-6), ("moe", "deepseek_v4", 1e-5), ("moe", "deepseek_v4_1", 1e-5)],
)
def test_a_converted_model_starts_where_the_ordinary_one_is(
    model: str,
    convention: str,
    bound: float,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, start = ordinary(model, folder), folder / f"{model} {convention}"
    command(monkeypatch, source, start, "--mhc-convention", convention)
    printed, shown = capsys.readouterr()
    lines = re.findall(r"^convert: copying: (\S+) of (\S+)B \[.*B/s\]$", shown, re.M)
    assert lines[0][0] == "0.00" and lines[-1][0] == lines[-1][1] == lines[0][1] != "0.00"
    assert "copying" not in printed and "\r" not in shown
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


def test_progress_is_a_line_that_rewrites_itself_on_a_terminal(folder: Path) -> None:
    """And standard output, which may go into a file, has none of it."""
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    command = [forking_python(), "-m", "megatron_mhc", "convert"]
    arguments = [ordinary("dense", folder), folder / "on a terminal"]
    with open(ours, "rb", buffering=0) as screen:
        done = subprocess.run(
            [*command, *map(str, arguments)],
            env=quiet(),
            stdout=subprocess.PIPE,
            stderr=terminal,
            text=True,
            check=True,
        )
        os.close(terminal)
        shown = screen.read(65536).decode()
    note, shown = shown.split("\r\n", 1)
    assert note == "(imports Megatron: some seconds)"
    states = shown.split("\r")
    assert states[0] == "" and "convert: copying:   0%|" in states[1], shown
    assert "convert: copying: 100%|" in shown and shown.count("\n") == 1
    assert max(map(len, states)) <= 80
    assert done.stdout.startswith("convert: wrote ") and done.stdout.count("\n") == 1


def test_converts_help_teaches() -> None:
    done = forked_python("-m", "megatron_mhc", "convert", "--help")
    for words in (
        *("SOURCE is only read", "--mhc-init", "--load runs/gpt-mhc/start", "iteration 0"),
        *("--from megatron NATIVE TARGET", "--to hf OURS TARGET --hf FOLDER", "no\ncounterpart"),
    ):
        assert words in done.stdout


def test_a_start_has_nothing_of_the_optimizer(folder: Path) -> None:
    source = read_metadata(find_checkpoint(ordinary("dense", folder))).state_dict_metadata
    start = read_metadata(find_checkpoint(with_mhc(folder))).state_dict_metadata
    past = [key for key in source if key.startswith(("optimizer", "chained_"))]
    assert past and not start.keys() & set(past)
