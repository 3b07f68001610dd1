"""`python -m megatron_mhc plot`: what is drawn is what the runs hold, and the page holds it all."""

import base64
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from megatron_mhc.__main__ import main
from megatron_mhc.metrics import strict_json
from megatron_mhc.metrics.formulas import residual_metrics
from megatron_mhc.metrics.monitor import METRICS_FILE
from megatron_mhc.tools.plot_page import write_plots
from megatron_mhc.tools.plot_pictures import Picture, pictures
from megatron_mhc.tools.plot_runs import largest, read_run

STEPS = [1, 5, 10]


def logged(step: int, variant: str = "mhc", sites: int = 40, scale: float = 1.0) -> dict[str, Any]:
    """A line of the metrics file whose composite gain is scale**sites."""
    h_res = scale * torch.eye(4).expand(sites, 3, 4, 4)
    means, maxima = residual_metrics(h_res)
    matrices = means.pop("h_res").tolist()
    site = {name: value.tolist() for name, value in (means | maxima).items()}
    line = {"step": step, "variant": variant, "num_streams": 4, "sites": list(range(sites))}
    return {**line, "gradient_norm": 1 / step, "site": site, "h_res": matrices}


def write_run(folder: Path, lines: list[dict[str, Any]], offset: float = 0.0) -> Path:
    """What a run leaves below its --tensorboard-dir."""
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for step in STEPS:
            writer.add_scalar("lm loss", offset + 1 / step, step)
            writer.add_scalar("grad-norm", 2.0 * step, step)
    if lines:
        text = "".join(strict_json.written(line) + "\n" for line in lines)
        (folder / "tensorboard" / METRICS_FILE).write_text(text)
    return folder


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """An ordinary run, one with mHC, one with HC that explodes and ends with infinities."""
    hc = [logged(step, "hc", scale=1.5) for step in STEPS]
    hc[-1]["site"]["depth_gain_forward_max"][-1] = float("inf")
    hc[-1]["h_res"][-1][0][0] = float("nan")
    write_run(tmp_path / "plain", [], 1.0)
    write_run(tmp_path / "mhc", [logged(step) for step in STEPS])
    write_run(tmp_path / "hc", hc, 0.5)
    return [f"the <plain>={tmp_path}/plain", f"{tmp_path}/mhc", f"HC={tmp_path}/hc"]


def drawn(texts: list[str]) -> dict[str, Picture]:
    runs = [read_run(text, f"C{number}") for number, text in enumerate(texts)]
    return {picture.name: picture for picture in pictures(runs)}


def lines_of(picture: Picture) -> dict[str, list[float]]:
    (axes,) = picture.figure.axes
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def test_what_is_drawn_is_what_the_runs_hold(three: list[str]) -> None:
    by_name = drawn(three)
    assert list(by_name) == [
        *("loss", "gradient_norm", "gain_over_steps", "gain_over_depth", "distance_to_identity"),
        *("h_res_mhc", "h_res_HC"),
    ]
    loss = lines_of(by_name["loss"])
    assert list(loss) == ["the <plain> (last 1.100)", "mhc (last 0.100)", "HC (last 0.600)"]
    assert loss["mhc (last 0.100)"] == pytest.approx([1, 1 / 5, 1 / 10])
    norms = lines_of(by_name["gradient_norm"])
    assert norms["HC, all parameters"] == pytest.approx([2, 10, 20])
    assert norms["HC, parameters of the hyper-connections"] == pytest.approx([1, 1 / 5, 1 / 10])
    gain = lines_of(by_name["gain_over_steps"])
    largest = 1.5**40
    assert gain[f"HC, backward (last {largest:.4g})"] == pytest.approx([largest] * 3)
    assert gain["mhc, forward (last 1)"] == pytest.approx([1] * 3)
    depth = lines_of(by_name["gain_over_depth"])
    assert depth["HC, forward, step 10"] == pytest.approx([1.5**site for site in range(1, 41)])
    assert depth["HC, backward, step 10"] == pytest.approx([1.5**site for site in range(40, 0, -1)])
    assert lines_of(by_name["distance_to_identity"])["HC (last 1)"] == pytest.approx([1] * 3)
    maps = [axes for axes in by_name["h_res_mhc"].figure.axes if axes.images]
    assert len(maps) == 32 and (maps[0].images[0].get_array() == torch.eye(4).numpy()).all()
    titles = [axes.get_title() for axes in maps]
    assert titles[0] == "layer 1\nattention" and titles[-1] == "layer 20\nMLP"
    assert "32 of 40 sites are shown" in by_name["h_res_mhc"].explanation


def test_axes_are_labelled_and_colours_go_by_run(three: list[str]) -> None:
    for name, picture in drawn(three).items():
        if name.startswith("h_res"):
            assert picture.figure.get_supxlabel() and picture.figure.get_supylabel()
            continue
        (axes,) = picture.figure.axes
        assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()
        labels = {text.get_text() for text in axes.get_legend().get_texts()}
        assert labels == {n for n in lines_of(picture) if not n.startswith("_")}
        colours = {line.get_color() for line in axes.get_lines() if "HC" in str(line.get_label())}
        assert colours == {"C2"}, name


def test_the_page_holds_every_picture_and_nothing_from_elsewhere(
    three: list[str], tmp_path: Path
) -> None:
    *images, page = write_plots(three, tmp_path / "out")
    text = page.read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert [base64.b64decode(image) for image in embedded] == [i.read_bytes() for i in images]
    assert len(images) == 7 == text.count("<figcaption>")
    for image in images:
        pixels = imread(image)
        assert pixels.shape[1] > 800 and pixels[..., :3].std() > 0.03, image
    assert "http" not in re.sub(r"base64,[^\"]+", "", text) and "<script" not in text
    assert "<td>the &lt;plain&gt;</td>" in text and f"<td>{1.5**40:.4g}</td>" in text


def test_the_command_shows_progress_on_standard_error(
    three: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "plot", three[0], "--output", str(tmp_path / "out")])
    main()
    printed, shown = capsys.readouterr()
    files = [line.removeprefix("plot: wrote ") for line in printed.splitlines()]
    assert files[-1] == f"{tmp_path}/out/index.html" and all(map(os.path.isfile, files))
    for line in ("reading: 0 of 1 runs", "reading: 1 of 1 runs", "drawing: 2 of 2 pictures"):
        assert f"plot: {line} [" in shown


def test_a_resumed_run_overwrites_the_steps_that_it_repeats(tmp_path: Path) -> None:
    write_run(tmp_path, [logged(1), logged(5), logged(5, scale=2.0)])
    run = read_run(str(tmp_path))
    assert run.over_steps("gain_forward_mean") == ([1, 5], [1.0, 2.0**40])


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "lr=0.1", [])
    assert read_run(str(folder)).label == "lr=0.1"
    assert read_run(f"mHC={folder}").label == "mHC"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["{}/none"], "none is not a folder: give a run's, FOLDER or LABEL=FOLDER"),
        (
            ["{}/empty"],
            "no 'lm loss' in TensorBoard event files below .*; train with .*, or give another one",
        ),
        (["{}/mhc", "{}/mhc"], "several runs are called mhc: give them names, LABEL=FOLDER"),
        (
            ["{}/broken"],
            r"mhc_metrics.jsonl, line 2 is no line of mHC's metrics \(JSON.* remove it",
        ),
    ],
)
def test_runs_that_cannot_be_drawn(texts: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "mhc", [logged(1)])
    broken = write_run(tmp_path / "broken", [logged(1)])
    with (broken / "tensorboard" / METRICS_FILE).open("a") as file:
        file.write('{"step": 2')
    with pytest.raises(SystemExit, match=message):
        write_plots([text.format(tmp_path) for text in texts], tmp_path / "out")


def test_what_is_no_number_is_null_and_comes_back() -> None:
    """Standard JSON has neither NaN nor infinities."""
    values = {"a": [1.5, float("nan"), [float("-inf"), 2]], "b": "text", "c": (0.0, True)}
    text = strict_json.written(values)
    assert text == '{"a": [1.5, null, [null, 2]], "b": "text", "c": [0.0, true]}'
    back = strict_json.read(text)
    assert math.isnan(back["a"][1]) and math.isnan(back["a"][2][0])
    assert (back["a"][0], back["a"][2][1], back["b"], back["c"]) == (1.5, 2, "text", [0.0, True])
    assert math.isnan(largest([1.0, float("nan"), 2.0])) and largest([1.0, 2.0]) == 2
