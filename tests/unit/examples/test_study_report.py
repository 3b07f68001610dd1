"""The report of the stability study on made curves whose answers are known."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.unit.examples.study_of import module

curves, tables = module("study.curves"), module("study.tables")
results = module("study.results")
MILLION = 10**6


def made(
    model: str, plan: str, last: float, /, *, tokens: int = 100, **more: Any
) -> dict[str, Any]:
    """Curves of a run of so many million tokens, a step a million; it ends at `last`."""
    losses = [last + 2 * math.exp(-step / 10) for step in range(1, tokens + 1)]
    kept = {
        "model": model,
        "plan": plan,
        "learning_rate": 1e-3,
        "seed": 1,
        "state": "finished",
        "seconds": 600,
        "train_iters": tokens,
        "warm_up": 5,
        "tokens_per_step": MILLION,
        "data": {"digest": "d" * 64, "train_tokens": 50, "valid_tokens": 2, "valid_bytes": 8},
        "hardware": "made",
        "versions": {"torch": "2"},
        "steps": tokens,
        "loss": losses,
        "gradient_norm": [1.0] * tokens,
        "validation": [[tokens // 2, last + 0.4], [tokens, last]],
        "step_seconds": [[tokens // 2, 0.5], [tokens, 0.5]],
        "updates": [],
    }
    return kept | more


def study(*kept: dict[str, Any]) -> Any:
    return results.Study([results.Result(one) for one in kept])


def cells(printed: str, *begin: str) -> list[str]:
    """The one row of a table that begins with these cells."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    (found,) = [row for row in rows if row[: len(begin)] == list(begin)]
    return found


def law(tokens: float) -> float:
    """A loss that falls by 0.3 nats in a factor of e in tokens."""
    return 8 - 0.3 * math.log(tokens)


@pytest.mark.parametrize(("ahead", "said"), [(1.5, "1.50 (extrapolated)"), (1.2, "1.20")])
def test_the_factor_by_whole_runs_is_that_of_the_law(ahead: float, said: str) -> None:
    """mHC takes 1.25 times as long: the ordinary model has that many tokens in its time."""
    slow = [[45, 0.625], [90, 0.625]]
    runs = [
        made("ordinary", "sweep", 9.0, tokens=30),
        made("ordinary", "main", law(90), tokens=90),
        made("mhc", "main", law(90 * ahead), tokens=90, step_seconds=slow),
    ]
    found = study(*runs)
    assert cells(tables.convergence(found), "mhc")[3] == "–"
    assert cells(tables.at_equal_time(found), "mhc")[5] == "–"
    found = study(*runs, made("ordinary", "longer", law(120), tokens=120))
    assert cells(tables.convergence(found), "mhc")[3] == said
    row = cells(tables.at_equal_time(found), "mhc")
    assert row[3:] == ["56", f"{law(90 * ahead):.4f}", f"{law(112.5):.4f}"]


def test_seeds_at_another_rate_than_the_best_are_no_seeds() -> None:
    swept = [made("mhc", "sweep", 3.1), made("mhc", "sweep", 3.0, learning_rate=2e-3)]
    base, other = made("ordinary", "main", 3.0), made("mhc", "main", 2.5)
    rows = [made("mhc", "main", 2.9, learning_rate=2e-3, seed=seed) for seed in (1, 2)]
    found = study(*swept, base, other, *rows)
    assert cells(tables.compared(found), "mhc")[1:4] == [
        "0.002",
        "2 of 2",
        "2.9000 (2.9000 to 2.9000)",
    ]
    assert cells(tables.swept(found), "mhc, main") == ["mhc, main", "2.5000", "2.9000"]
    # until there is one at the best rate, what there is counts
    assert cells(tables.compared(study(*swept, base, other)), "mhc")[1:3] == ["0.001", "1 of 1"]


def test_the_factor_on_the_curves_is_where_they_cross_or_not_reached() -> None:
    long = made("ordinary", "main", 3.0, tokens=200, validation=[[100, 3.4], [200, 3.0]])
    printed = tables.convergence(study(long, made("mhc", "main", 3.2)))
    # half way between its two points: 150 million tokens for mHC's 100
    assert cells(printed, "mhc")[2] == "1.50"
    better = tables.convergence(study(made("ordinary", "main", 3.0), made("mhc", "main", 2.9)))
    row = cells(better, "mhc")
    assert row[2] == "not reached: above 1.00" and row[3] == "–"
    # mHC is at 3.0 after three quarters of the way from 3.3 (50 million) to 2.9 (100 million)
    assert row[4] == f"{100 / 87.5:.2f}"


def test_seeds_are_compared_in_pairs_and_what_broke_is_left_out() -> None:
    runs = [made("ordinary", "main", 3.0 + 0.1 * seed, seed=seed) for seed in (1, 2, 3)]
    runs += [made("mhc", "main", 2.9 + 0.1 * seed, seed=seed) for seed in (1, 2)]
    runs += [made("mhc", "main", 5.0, seed=3, gradient_norm=[1.0] * 90 + [0.0] * 10)]
    row = cells(tables.compared(study(*runs)), "mhc")
    assert row[2] == "2 of 3"
    assert row[3] == "3.0500 (3.0000 to 3.1000)"
    assert row[4] == "-0.1000 (-0.1000 to -0.1000)"


def test_the_time_of_a_step_is_compared_and_losses_at_equal_time() -> None:
    slow = made("mhc", "main", 2.9, step_seconds=[[50, 0.75], [99, 0.75], [100, 9.0]])
    both = study(made("ordinary", "main", 3.0), slow)
    assert cells(tables.compared(both), "mhc")[5:7] == ["750", "1.50"]
    # the ordinary model trains for 50 s; mHC is then at step 66.7, a third of the way to its end
    row = cells(tables.at_equal_time(both), "mhc")
    assert row[1:] == ["50", f"{3.3 - 0.4 / 3:.4f}", "75", "2.9000", "–"]


def test_the_rate_that_breaks_a_model_is_the_lowest() -> None:
    rose = [3.0] * 50 + [3.7] * 50
    printed = tables.breaking(
        study(
            made("hc", "sweep", 3.0),
            made("hc", "breaks", 3.0, learning_rate=1e-2, loss=rose),
            made("hc", "breaks", 3.0, learning_rate=3e-2, state="broke"),
        )
    )
    assert cells(printed, "hc")[1:] == ["0.01 (broke: the loss rose, breaks)", "0.001"]


def test_the_best_rate_is_of_a_run_that_did_not_break() -> None:
    rose = [3.0] * 50 + [3.7] * 40 + [2.0] * 10
    found = study(
        made("mhc", "sweep", 3.1),
        made("mhc", "sweep", 3.0, learning_rate=2e-3),
        made("mhc", "sweep", 2.0, learning_rate=4e-3, loss=rose),
    )
    assert found.best_rates() == {"mhc": 2e-3}


def test_an_ablation_stands_beside_the_swept_mhc_at_its_rate() -> None:
    printed = tables.ablations(
        study(
            made("mhc", "sweep", 3.1),
            made("mhc", "sweep", 9.0, learning_rate=2e-3),
            made("mhc_n8", "ablations", 3.05),
        )
    )
    assert cells(printed, "mhc_n8")[2:5] == ["finished", "3.0500", "-0.0500"]


def test_curves_of_different_data_are_not_mixed(tmp_path: Path) -> None:
    one, two = made("mhc", "sweep", 3.1), made("hc", "sweep", 3.1)
    two["data"] = two["data"] | {"digest": "e" * 64}
    for name, kept in (("one", one), ("two", two)):
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match="trained on different data"):
        curves.load(tmp_path)


def test_the_whole_report_and_its_pictures(tmp_path: Path) -> None:
    from matplotlib.image import imread

    line = {"forward": 1.0, "backward": 1.5, "away": [0.1, 0.1, 0.1], "read": 1.3, "written": 4.0}
    line |= {"apart": 0.1, "forward_max": 1.0, "backward_max": 2.0, "gradient_norm": 0.1}
    matrix = [[0.9, 0.1], [0.1, 0.9]]
    with_metrics = {
        "logged": [line | {"step": step} for step in (1, 50, 100)],
        "last": {"step": 100, "sites": [0, 1], "h_res": [matrix] * 2},
        "updates": [
            {"step": step, "groups": {"bias_res": [1e-8, 1e-8, 0.3, 1.0]}} for step in (1, 50, 100)
        ],
    }
    runs = [made("ordinary", p, 3.0) for p in ("sweep", "main")]
    runs += [made("mhc", p, 2.9, **with_metrics) for p in ("sweep", "main")]
    runs += [made("ordinary", "longer", 2.95, tokens=133)]
    whole = study(*runs)
    printed = tables.report(whole)
    titles = [row.removeprefix("### ") for row in printed.splitlines() if row.startswith("### ")]
    assert titles == [title for title in tables.PARTS if title not in ("Ablations", "Speed")]
    assert cells(printed, "mhc", "bias_res", "50")[3:] == ["1e-08", "1e-08", "0.3", "100%"]
    drawn = module("study.pictures").draw(whole, tmp_path)
    names = {"rates", "over_tokens", "over_time", "streams", "adam", "h_res_mhc"}
    assert {file.stem for file in drawn} == names
    for file in drawn:
        assert imread(file)[..., :3].std() > 0.05, file


def test_a_step_takes_the_least_median_of_the_model_on_that_card() -> None:
    """A host that did something else beside one of the runs does not make the model slower."""
    runs = (
        made("ordinary", "main", 2.0),
        made("mhc", "main", 1.9, step_seconds=[[1, 0.9], [2, 0.7], [3, 0.8]]),
        made("mhc", "sweep", 2.4, step_seconds=[[1, 0.6], [2, 9.0], [3, 0.6]]),
        made("mhc", "speed", 2.4, step_seconds=[[1, 0.1]], hardware="another card"),
    )
    assert cells(tables.compared(study(*runs)), "mhc")[5:7] == ["600", "1.20"]
    assert cells(tables.every_run(study(*runs)), "main", "mhc")[9] == "800"
