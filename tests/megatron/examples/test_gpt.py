"""The main job: data, training, resuming, sampling and the plot, as `make train` runs them."""

import importlib.util
import json
import math
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_mhc.tools.plot_runs import curves
from tests.megatron.common.flags import numbered_losses
from tests.megatron.common.launch import ROOT, forking_python, quiet

EXAMPLE = ROOT / "examples"
TINY = [
    *("--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "64"),
    *("--num-attention-heads", "2", "--seq-length", "64", "--max-position-embeddings", "64"),
    *("--eval-iters", "1"),
]
STEPS = 6


def load(name: str) -> ModuleType:
    """An example's script as a module; `examples/` is no package."""
    spec = importlib.util.spec_from_file_location(f"gpt_example_{name}", EXAMPLE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What `train.sh` leaves behind and prints for a tiny model with mHC."""
    runs = tmp_path_factory.mktemp("runs")
    settings = {"RUNS": str(runs), "ITERATIONS": str(STEPS), "MHC": "1", "PYTHON": forking_python()}
    done = subprocess.run(
        [EXAMPLE / "train.sh", *TINY],
        env=quiet(**settings),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return runs, done.stdout


def test_it_trains_with_mhc_and_resumes_where_it_stopped(run: tuple[Path, str]) -> None:
    _, printed = run
    first, second = printed.split("== resuming from the checkpoint")
    assert [iteration for iteration, _ in numbered_losses(first)] == [1, 2, 3]
    assert [iteration for iteration, _ in numbered_losses(second)] == [4, 5, 6]
    assert first.count("mHC is on") == second.count("mHC is on") == 1
    start = float(numbered_losses(first)[0][1])
    assert start == pytest.approx(math.log(257), abs=0.2)
    assert float(numbered_losses(second)[-1][1]) < start - 0.2


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one_bit_for_bit(
    run: tuple[Path, str], tmp_path: Path
) -> None:
    runs, printed = run
    command = shlex.split((runs / "gpt-mhc" / "command").read_text())
    for flag in ("--save", "--load", "--tensorboard-dir"):
        command[command.index(flag) + 1] = str(tmp_path / flag)
    # Nothing is saved on the way, so that not even that can part the two.
    command[command.index("--save-interval") + 1] = "1000"
    command += ["--no-save-optim", "--no-save-rng"]
    done = subprocess.run(command, cwd=ROOT, env=quiet(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    # The event files hold each step's own loss; the printed one may be a mean over a few steps.
    tags = ("lm loss", "lm loss validation", "grad-norm", "learning-rate")
    whole, resumed = curves(tmp_path, *tags), curves(runs / "gpt-mhc", *tags)
    for tag in tags:
        assert whole[tag] == resumed[tag], tag
        assert whole[tag].steps == list(range(1, STEPS + 1))
    # After a start Megatron prints step 1 alone, then the mean of steps 1 and 2.
    alone = [0, 2, 3, 5]
    here, there = numbered_losses(done.stdout), numbered_losses(printed)
    assert [here[step] for step in alone] == [there[step] for step in alone]


def test_the_printed_entropy_is_that_of_the_tokens_on_disk(run: tuple[Path, str]) -> None:
    runs, printed = run
    tokens = np.fromfile(runs / "data" / "stdlib.bin", dtype=np.uint16)
    counts = Counter(tokens.tolist())
    documents = counts.pop(256)
    total = sum(counts.values())
    entropy = sum(count / total * math.log(total / count) for count in counts.values())
    summary = json.loads((runs / "data" / "stdlib.json").read_text())
    assert summary["unigram_entropy_nats"] == pytest.approx(entropy, rel=1e-12)
    assert (summary["bytes"], summary["documents"]) == (total, documents)
    assert f"{total:,} bytes in {documents:,} documents" in printed
    assert f"unigram entropy {entropy:.4f} nats a byte" in printed
    assert 2.5 < entropy < 3.5


def test_it_samples_from_the_last_checkpoint(run: tuple[Path, str]) -> None:
    runs, _ = run
    text = (runs / "gpt-mhc" / "sample.txt").read_text()
    assert re.findall(r"^--- sample (\d) of 2, iteration (\d) ---$", text, re.M) == [
        ("1", "6"),
        ("2", "6"),
    ]
    assert len(re.findall(r"^def ", text, re.M)) == 2
    assert len(text) > 200


def test_the_plot_of_the_run_is_a_picture(run: tuple[Path, str]) -> None:
    from matplotlib.image import imread

    runs, printed_log = run
    picture = imread(runs / "gpt-mhc" / "loss.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 800
    assert picture[..., :3].std() > 0.05
    # what the log says is what was drawn
    curve = curves(runs / "gpt-mhc", "lm loss")["lm loss"]
    assert curve.steps == list(range(1, STEPS + 1))
    printed = dict(numbered_losses(printed_log))
    assert [printed[step] for step in (1, 3, 4, 6)] == [
        f"{curve.values[step - 1]:.6E}" for step in (1, 3, 4, 6)
    ]


def test_the_plot_draws_what_the_event_files_of_two_runs_hold(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    for folder, offset in (("a", 0.0), ("b", 1.0)):
        with SummaryWriter(str(tmp_path / folder / "tensorboard")) as writer:
            for step in (10, 20, 30):
                writer.add_scalar("lm loss", offset + 1 / step, step)
            writer.add_scalar("lm loss validation", offset + 0.5, 30)
    # A second process resumed from 20: its value for 30 replaces the first one's.
    with SummaryWriter(str(tmp_path / "a" / "tensorboard"), filename_suffix=".resumed") as writer:
        writer.add_scalar("lm loss", 7.0, 30)
    plot_loss = load("plot_loss")
    figure = plot_loss.draw({"A": tmp_path / "a", "B": tmp_path / "b"}, entropy=3.25)
    (axes,) = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    known = {
        "A, training": [[10, 0.1], [20, 0.05], [30, 7.0]],
        "A, validation (last 0.500)": [[30, 0.5]],
        "B, training": [[10, 1.1], [20, 1.05], [30, 1 + 1 / 30]],
        "B, validation (last 1.500)": [[30, 1.5]],
        "unigram entropy of the data (3.250)": [[0, 3.25], [1, 3.25]],
    }
    assert drawn.keys() == known.keys()
    for label, points in known.items():
        np.testing.assert_allclose(drawn[label], points, rtol=1e-6)
    assert "iteration" in axes.get_xlabel() and "nats" in axes.get_ylabel()
    assert {text.get_text() for text in axes.get_legend().get_texts()} == known.keys()


def test_data_are_whole_files_in_order_and_a_second_run_skips(tmp_path: Path) -> None:
    source = tmp_path / "library"
    for name, content in {
        "b.py": b"aabb",
        "a/c.py": b"\xff\x00",
        "a/empty.py": b"",
        "a/test/t.py": b"test",
        "site-packages/p.py": b"package",
        "encodings/e.py": b"table",
        "note.txt": b"text",
    }.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    output = tmp_path / "data" / "small"
    script = str(EXAMPLE / "prepare_data.py")
    command = [forking_python(), script, "--output", str(output), "--source", str(source)]
    done = subprocess.run(command, env=quiet(), capture_output=True, text=True, check=True)
    assert "prepare_data: reading: 2 of 2 files [" in done.stderr and "reading" not in done.stdout
    first = done.stdout
    tokens = np.fromfile(output.with_suffix(".bin"), dtype=np.uint16).tolist()
    assert tokens == [0xFF, 0x00, 256, *b"aabb", 256]
    # two bytes of six, twice; one of six, twice
    entropy = 2 * (2 / 6) * math.log(3) + 2 * (1 / 6) * math.log(6)
    assert f"6 bytes in 2 documents, unigram entropy {entropy:.4f}" in first
    written = output.with_suffix(".bin").stat().st_mtime_ns
    second = subprocess.run(command, env=quiet(), capture_output=True, text=True, check=True).stdout
    assert "is there already" in second and first.splitlines()[-1] in second
    assert output.with_suffix(".bin").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("train.sh", [], "MHC is 'maybe'; it must be 1 or 0"),
        ("train.sh", ["MHC=1"], "ITERATIONS is 'many'; it must be a number, 2 or more"),
        ("prepare_data.py", ["--output", "x", "--source", "/no/such"], "is not a folder"),
        ("plot_loss.py", ["/no/such", "--output", "x.png"], "/no/such is not a folder"),
    ],
)
def test_bad_input_is_named(script: str, arguments: list[str], says: str) -> None:
    settings = {"MHC": "maybe", "ITERATIONS": "many"}
    command = [forking_python(), str(EXAMPLE / script), *arguments]
    if script == "train.sh":
        command = ["env", *arguments, str(EXAMPLE / script)]
    done = subprocess.run(command, env=quiet(**settings), capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr


def test_a_folder_without_event_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no 'lm loss' in TensorBoard event files below"):
        load("plot_loss").draw({"A": tmp_path})
