"""fp16 with Megatron's dynamic loss scaling: it trains, skips steps, and logs what is no number."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import NoReturn

import pytest

from megatron_mhc.metrics.monitor import METRICS_FILE
from megatron_mhc.tools.plot_runs import read_run
from tests.megatron.common.flags import SCRIPT, TINY, training_log
from tests.megatron.common.launch import forked_run

FP16 = [
    *("--fp16", "--initial-loss-scale", str(2**20), "--hysteresis", "1", "--train-iters", "12"),
    "--no-check-for-nan-in-loss-and-grad",
]
STEPS = ["--tensorboard-log-interval", "1", "--mhc-log-interval", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fp16")


@pytest.fixture(scope="module")
def log(folder: Path) -> list[str]:
    """Megatron's line of every iteration."""
    flags = ["--mhc", *STEPS, "--tensorboard-dir", str(folder)]
    status, printed = forked_run(1, SCRIPT, *TINY, *FP16, *flags)
    assert status == 0, printed[-3000:]
    return training_log(printed)


def values(log: list[str], name: str) -> list[float]:
    """A number of every iteration that has it; Megatron logs no loss of a skipped one."""
    found = (re.search(rf"\| {name}: +(\S+)", line) for line in log)
    return [float(match[1]) for match in found if match]


def test_it_trains_and_skips_as_the_ordinary_model(log: list[str]) -> None:
    status, printed = forked_run(1, SCRIPT, *TINY, *FP16)
    assert status == 0, printed[-3000:]
    ordinary = training_log(printed)
    assert len(log) == len(ordinary) == 12
    scales = values(log, "loss scale")
    assert scales == values(ordinary, "loss scale")
    # it starts at 2^20, which overflows; which others do is up to the weights that PyTorch draws
    skipped = ["grad norm" not in line for line in log]
    assert skipped == ["grad norm" not in line for line in ordinary]
    assert skipped[0] and sum(skipped) < 6, "half of the steps train at least"
    assert scales == [2.0 ** (20 - total) for total in itertools.accumulate(skipped)]
    losses = [loss for loss in values(log, "lm loss") if loss]
    # the first update comes after it. A mean of 32 losses of fp16 numbers, each rounded to 5e-4:
    # 4e-7 is seen
    first = next(loss for loss in values(ordinary, "lm loss") if loss)
    assert losses[0] == pytest.approx(first, rel=1e-4)
    # 24 samples of the stand-in's data: from 4.85 nats to 4.18, the ordinary model's too
    assert losses[-1] < losses[0] - 0.5


def test_a_skipped_step_is_logged_as_json(log: list[str], folder: Path) -> None:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / METRICS_FILE).read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8, 10, 12]
    assert lines[0]["gradient_norm"] is None and lines[-1]["gradient_norm"] > 0
    norms = read_run(str(folder)).over_steps("gradient_norm").values
    assert math.isnan(norms[0]) and norms[-1] == lines[-1]["gradient_norm"]
