"""examples/stability at a reduced size: what its report says of HC and mHC holds here too."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from megatron_mhc.tools.plot_runs import Run, read_run
from tests.megatron.common.launch import ROOT, forking_python, quiet

EXAMPLE = ROOT / "examples" / "stability"
REDUCED = ["--iterations", "20", "--learning-rates", "3e-2", "--num-layers", "12"]


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """An example's script, run as a user does."""
    command = [forking_python(), str(EXAMPLE / name), *arguments]
    return subprocess.run(command, env=quiet(), capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HC and mHC at the tiny size with fewer layers and steps."""
    folder = tmp_path_factory.mktemp("study")
    done = script("run.py", "tiny", "--runs", str(folder), "--models", "hc", "mhc", *REDUCED)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "2 of 2 runs are done" in done.stdout
    return folder / "tiny"


@pytest.fixture(scope="module")
def runs(study: Path) -> dict[str, Run]:
    return {model: read_run(f"{study}/{model}-lr0.03-seed1234") for model in ("hc", "mhc")}


def gains(run: Run) -> list[float]:
    """The largest composite gain of any token, forward or backward, of every logged step."""
    ways = (run.over_steps(f"gain_{way}_max").values for way in ("forward", "backward"))
    return [max(pair) for pair in zip(*ways, strict=True)]


def test_the_composite_gain_of_mhc_stays_below_two(runs: dict[str, Run]) -> None:
    assert [line["step"] for line in runs["mhc"].logged] == list(range(1, 21))
    # 24 sites, whose rows' sums fp32 misses by 2e-7 each
    assert gains(runs["mhc"])[0] == pytest.approx(1, abs=5e-6)
    assert max(gains(runs["mhc"])) < 2


def test_the_composite_gain_of_hc_grows_past_it(runs: dict[str, Run]) -> None:
    assert gains(runs["hc"])[0] == 1, "HC starts at identities, which nothing rounds"
    # 8e5 is seen; a rounding that grows with it may take a power of ten or two, not all six
    assert gains(runs["hc"])[-1] > 1000 * gains(runs["mhc"])[-1]


def test_both_learn_and_h_res_leaves_its_start(runs: dict[str, Run]) -> None:
    for run in runs.values():
        assert run.loss.values[-1] < run.loss.values[0] - 1
        first, last = (line["site"]["to_identity"] for line in (run.logged[0], run.logged[-1]))
        # mHC's moves by 6e-3 in 20 steps, HC's by more; fp32 rounds such a distance by 1e-7
        assert max(abs(a - b) for a, b in zip(first, last, strict=True)) > 1e-3


def test_a_second_call_trains_nothing_again(study: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in study.glob("*/train.log")}
    again = script("run.py", "tiny", "--runs", str(study.parent), "--models", "hc", *REDUCED)
    assert "1 of 1 runs are done" in again.stdout and ": finished in" not in again.stdout
    assert before == {file: file.stat().st_mtime_ns for file in study.glob("*/train.log")}


def test_the_report_has_a_line_for_each_run(study: Path, runs: dict[str, Run]) -> None:
    printed = script("report.py", str(study)).stdout
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    rows = {line[0]: line for line in lines if line and line[0] in runs}
    for model, row in rows.items():
        losses, gain = runs[model].loss.values, runs[model].over_steps("gain_forward_mean").values
        assert row[1:5] == ["0.03", "1234", "20", "finished"]
        assert row[5] == f"{sum(losses[-10:]) / 10:.3f}"
        assert row[8] == f"{gain[0]:.4g}, {gain[-1]:.4g}, {max(gain):.4g}"
    assert set(rows) == {"hc", "mhc"}


def test_a_model_without_gradients_counts_as_broken(tmp_path: Path) -> None:
    """The loss of one whose outputs are 0 is a constant: it neither rises nor is it no number."""
    from torch.utils.tensorboard import SummaryWriter

    last_gradients = {"dead": [3.0, 0.0, 2.0, 0.0, 0.0], "alive": [3.0, 0.0, 0.0, 0.0, 1e-9]}
    for rate, (name, norms) in enumerate(last_gradients.items()):
        made = {"model": "ordinary", "learning_rate": rate, "seed": 1, "state": "finished"}
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(made))
        with SummaryWriter(str(tmp_path / name)) as writer:
            for step, norm in enumerate(norms, 1):
                writer.add_scalar("lm loss", 5.6, step)
                writer.add_scalar("grad-norm", norm, step)
    printed = script("report.py", str(tmp_path)).stdout
    assert "| 0 | 1 | 5 | broke: gradients 0 from step 4 |" in printed
    assert "| 1 | 1 | 5 | finished |" in printed


def test_what_is_no_number_counts_as_broken_and_an_error_does_not(tmp_path: Path) -> None:
    arguments = ["tiny", "--runs", str(tmp_path), "--models", "ordinary", "--iterations", "20"]
    arguments += ["--num-layers", "2"]
    broke = script("run.py", *arguments, "--learning-rates", "1e30", "--clip-grad", "0")
    assert broke.returncode == 0 and ": broke in" in broke.stdout, broke.stdout + broke.stderr
    wrong = script("run.py", *arguments, "--learning-rates", "1e-3", "--no-such-flag")
    assert wrong.returncode == 1 and ": failed in" in wrong.stdout
    assert "unrecognized arguments: --no-such-flag" in wrong.stderr
    states = [json.loads(file.read_text())["state"] for file in tmp_path.glob("tiny/*/run.json")]
    assert sorted(states) == ["broke", "failed"]
    assert re.search(r"a run failed: the train.log that is named above says why", wrong.stderr)
    assert re.search(r"^\S+/tiny/\S+/train.log:$", wrong.stderr, re.M)
