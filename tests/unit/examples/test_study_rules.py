"""The rules of the stability study on numbers whose answer is known."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from tests.unit.examples.study_of import module

rules = module("study.statistics")
text = module("study.text")
curves = module("study.curves")
schedule = module("study.schedule")
plans, commands = module("study.plans"), module("study.commands")


def noisy(steps: int) -> list[float]:
    """A loss that falls from 4 to 3 with noise of 0.02."""
    draw = random.Random(1)
    return [3 + math.exp(-step / 100) + draw.gauss(0, 0.02) for step in range(steps)]


def test_noise_alone_has_no_spike() -> None:
    assert rules.spikes(noisy(2000), warm_up=50) == []


def test_spikes_are_counted_once_each_where_they_begin() -> None:
    losses = noisy(1000)
    for first, height, length in ((300, 1.0, 1), (500, 0.5, 8), (700, 0.3, 1), (702, 0.3, 1)):
        for step in range(first, first + length):
            losses[step - 1] += height
    assert rules.spikes(losses, warm_up=50) == [300, 500, 700, 702]
    # the second of two that touch is the first one's: the loss has not come back between them
    losses[701 - 1] += 0.3
    assert rules.spikes(losses, warm_up=50) == [300, 500, 700]


def test_a_rise_below_the_bound_and_one_in_the_warm_up_are_none() -> None:
    losses = noisy(1000)
    losses[600] += 0.06  # below 0.1 nats
    losses[60] += 2
    assert rules.spikes(losses, warm_up=100) == []


def test_a_loss_that_is_no_number_is_a_spike() -> None:
    losses = noisy(400)
    losses[199] = math.nan
    assert rules.spikes(losses, warm_up=50) == [200]


@pytest.mark.parametrize(
    ("losses", "norms", "state", "said"),
    [
        ([3.0] * 40, [1.0] * 40, "finished", "finished"),
        ([3.0] * 20 + [3.6] * 20, [1.0] * 40, "finished", "broke: the loss rose"),
        ([3.0] * 20 + [3.4] * 20, [1.0] * 40, "finished", "finished"),
        ([3.0] * 40, [1.0] * 30 + [0.0] * 10, "finished", "broke: gradients 0 from step 31"),
        ([3.0] * 39 + [math.nan], [1.0] * 40, "stopped", "broke: no number"),
        ([3.0] * 40, [1.0] * 40, "broke", "broke: no number"),
        ([3.0] * 40, [1.0] * 40, "stopped", "stopped"),
    ],
)
def test_what_counts_as_broken(
    losses: list[float], norms: list[float], state: str, said: str
) -> None:
    assert rules.outcome(losses, norms, state) == said


def test_tokens_for_a_loss_follow_the_law_that_made_the_runs() -> None:
    def loss(tokens: float) -> float:
        return 10 - 0.3 * math.log(tokens)

    ends = [(tokens, loss(tokens)) for tokens in (1e8, 3e8)]
    for tokens in (2e8, 5e8):
        assert rules.tokens_for(*ends, loss(tokens)) == pytest.approx(tokens, rel=1e-9)
    assert rules.tokens_for((1e8, 3.0), (3e8, 3.0), 2.9) is None


def test_where_a_curve_first_reaches_a_level() -> None:
    points = [(10, 5.0), (20, 4.0), (30, 4.5), (40, 3.0)]
    assert rules.reached(points, 4.25) == 17.5
    assert rules.reached(points, 3.5) == pytest.approx(30 + 10 * 2 / 3)
    assert rules.reached(points, 5.0) == 10
    assert rules.reached(points, 2.9) is None


def test_a_band_stands_where_all_seeds_have_a_value() -> None:
    rows = rules.band([[(1, 2.0), (2, 1.0)], [(1, 4.0), (2, 1.5), (3, 1.0)]])
    assert rows == [(1, 3.0, 2.0, 4.0), (2, 1.25, 1.0, 1.5)]
    assert rules.band([]) == []


def test_how_many_streams_count() -> None:
    assert curves.effective([0.5] * 4) == pytest.approx(4)
    assert curves.effective([1.0, 0, 0, 0]) == pytest.approx(1)
    assert curves.effective([3.0, -3.0, 0, 0]) == pytest.approx(2)


def test_held_out_packages_are_the_first_by_hash_and_none_is_large() -> None:
    sizes = {f"package{i}": 100 for i in range(1000)}
    held = text.held_out(sizes, 0.02)
    order = text.by_name(sizes)
    assert held == set(order[:20])
    # one of more than a quarter of the share is passed over
    sizes[order[0]] = 100_000
    assert order[0] not in text.held_out(sizes, 0.02)
    assert text.held_out({"one": 100, "two": 100}, 0.02) == set()


def test_paragraphs_that_differ_in_white_space_alone_occur_once(tmp_path: Path) -> None:
    twice = "def f(x):\n    return x + 1  # " + "; ".join(["said at length"] * 10)
    own = {name: f"# {name} " + " ".join(["has its own words too"] * 12) for name in "ab"}
    for name in "ab":
        (tmp_path / name).mkdir()
        indent = "" if name == "a" else "  "
        lines = "\n".join(indent + line for line in twice.split("\n"))
        (tmp_path / name / "m.py").write_text(f"{own[name]}\n\n{lines}\n")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "copy.py").write_text((tmp_path / "a" / "m.py").read_text())
    left = list(text.documents(text.candidates([tmp_path]), 1, set()))
    assert [(d.package, d.text) for d in left] == [
        ("a", f"{own['a']}\n\n{twice}\n"),
        ("b", f"{own['b']}\n"),
    ]


def test_what_is_no_text_of_a_person_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    good = "".join(f"a line of prose, number {i}\n" for i in range(20))
    for name, content in {
        "good.py": good.encode(),
        "latin.py": good.encode() + b"\xe9",
        "table.txt": b"1, 2, 3, " * 100,
        "short.md": b"short\n",
        "image.png": good.encode(),
    }.items():
        (folder / name).write_bytes(content)
    for name in ("__pycache__", "site-packages"):
        (folder / name).mkdir()
        (folder / name / "x.py").write_text(good + name)
    (tmp_path / "__editable___megatron_mhc_finder.py").write_text(good + "path")
    left = list(text.documents(text.candidates([tmp_path]), 1, set()))
    assert [d.path for d in left] == ["package/good.py"]


@pytest.mark.parametrize(
    ("count", "visible", "gpus"),
    [
        (2, None, ["0", "1"]),
        (2, "3,5,6", ["3", "5"]),
        (1, "GPU-1f,GPU-2e", ["GPU-1f"]),
        (3, "3,5", None),
        (1, "", None),
    ],
)
def test_each_run_has_a_gpu_of_those_that_are_visible(
    count: int, visible: str | None, gpus: list[str] | None
) -> None:
    given = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "9"}
    if gpus is None:
        says = f"--gpus {count}, but CUDA_VISIBLE_DEVICES=.*: (give --gpus|make a device)"
        with pytest.raises(ValueError, match=says):
            schedule.places(count, given, True, visible)
    else:
        found = schedule.places(count, given, True, visible)
        assert found == [{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
    # a CPU is shared
    assert schedule.places(count, given, False, visible) == [given] * count


def planned(folder: Path, plan: str, **only: Any) -> list[Any]:
    """The runs of a plan whose whole runs have 1200 steps."""
    held = dict.fromkeys(("digest", "train_tokens", "valid_tokens", "valid_bytes"), 10**6)
    (folder / "data.json").write_text(json.dumps(held))
    size = plans.SIZES["paper_ratio"]
    wanted = dict.fromkeys(("models", "seeds", "learning_rates")) | only
    rates = dict.fromkeys(plans.COMPARED, 1e-3)
    paths = dict.fromkeys(("folder", "curves", "data"), folder)
    return commands.runs_of(
        plan, size, tokens=1200 * size.step, rates=rates, **wanted, **paths, more=[]
    )


def test_the_warm_up_is_as_long_in_a_short_run_as_in_a_whole_one(tmp_path: Path) -> None:
    """Else a sweep would find the best rate of another warm-up."""
    for plan, steps in (("main", 1200), ("sweep", 400), ("breaks", 200)):
        for run in planned(tmp_path, plan):
            given = dict(itertools.pairwise(run.arguments))
            assert (given["--train-iters"], given["--lr-warmup-iters"]) == (str(steps), "60")
            assert (run.described["train_iters"], run.described["warm_up"]) == (steps, 60)


def test_a_piece_of_a_plan_takes_what_is_named(tmp_path: Path) -> None:
    found = planned(tmp_path, "main", models=["mhc", "ordinary"], seeds=[1, 3])
    names = [(run.described["model"], run.described["seed"]) for run in found]
    assert names == [("ordinary", 1), ("mhc", 1), ("ordinary", 3), ("mhc", 3)]
    [run] = planned(tmp_path, "sweep", models=["mhc"], learning_rates=[5e-4])
    assert run.folder.name == "mhc-lr0.0005-seed1-400steps"
    has = r"nothing of that .* ordinary of seed 1 at 0.001, hc of seed 1 at 0.001"
    with pytest.raises(SystemExit, match=has):
        planned(tmp_path, "main", models=["hc"], seeds=[2])
    with pytest.raises(SystemExit, match=r"nothing of that .* mhc of seed 1 at 0.0005"):
        planned(tmp_path, "sweep", learning_rates=[7e-4])
