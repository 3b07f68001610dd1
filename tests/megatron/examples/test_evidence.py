"""The plans of examples/stability on a CPU: text, runs that stop and go on, curves, report."""

import hashlib
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.megatron.common.launch import ROOT, forking_python, quiet
from tests.unit.examples.study_of import module

EXAMPLE = ROOT / "examples" / "stability"
VOCABULARY = 512
SHARED = "This paragraph stands in every package, as a licence does; it says nothing at all.\n" * 3


def script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """An example's script, run as a user does."""
    command = [forking_python(), str(EXAMPLE / name), *map(str, arguments)]
    return subprocess.run(command, env=quiet(), capture_output=True, text=True, timeout=400)


def write_packages(root: Path) -> None:
    """500 packages of a kilobyte, each with a paragraph that all have and one of the one before."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioulmnrst", k=draw.randint(2, 8))) for _ in range(400)]
    last = "nothing before the first package"
    for number in range(500):
        folder = root / f"package{number}"
        folder.mkdir(parents=True)
        own = " ".join(draw.choices(words, k=40 + draw.randint(0, 20)))
        parts = [SHARED, own, last, " ".join(draw.choices(words, k=40))]
        (folder / "module.py").write_text("\n\n".join(parts) + "\n")
        last = own


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packages")
    write_packages(root)
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def prepared(packages: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--output", output, "--roots", packages, "--vocab-size", str(VOCABULARY)]
    return script("prepare_text.py", *arguments, *more)


@pytest.fixture(scope="module")
def data(packages: Path, runs: Path) -> Path:
    """The text, where `run.py tiny` finds it made."""
    folder = runs / "data" / "tiny"
    done = prepared(packages, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def decoded(data: Path, name: str) -> list[str]:
    """The documents of a dataset, as text again."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    tokens = np.fromfile(data / f"{name}.bin", dtype=np.uint16)
    assert tokens.max() == VOCABULARY - 1, "the end of a document is the last id"
    parts = np.split(tokens, np.flatnonzero(tokens == VOCABULARY - 1) + 1)
    assert len(parts.pop()) == 0
    return tokenizer.decode_batch([part[:-1].tolist() for part in parts])


def paragraphs(texts: list[str]) -> list[str]:
    return [" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text)]


def test_held_out_text_shares_no_paragraph_with_training_text(data: Path) -> None:
    train, valid = (paragraphs(decoded(data, name)) for name in ("train", "valid"))
    assert not set(train) & set(valid)
    assert max(Counter(train + valid).values()) == 1
    # the paragraph of all is in the training text once; packages share others in pairs
    assert train.count(" ".join(SHARED.split())) == 1
    assert len(train) > 900 and len(valid) >= 10


def test_the_held_out_packages_are_those_of_the_rule(data: Path, packages: Path) -> None:
    made = json.loads((data / "data.json").read_text())
    order = sorted(
        (folder.name for folder in packages.iterdir()),
        key=lambda name: hashlib.sha256(name.encode()).hexdigest(),
    )
    count = len(made["held_out"])
    assert made["held_out"] == sorted(order[:count])
    size = {name: (packages / name / "module.py").stat().st_size for name in order}
    whole = sum(size.values())
    held = sum(size[name] for name in order[:count])
    assert held >= 0.02 * whole > held - size[order[count - 1]]


def test_the_same_packages_elsewhere_make_the_same_data(
    data: Path, packages: Path, tmp_path: Path
) -> None:
    digest = json.loads((data / "data.json").read_text())["digest"]
    (tmp_path / "elsewhere").symlink_to(packages)
    again = prepared(tmp_path / "elsewhere", tmp_path / "again", "--digest", digest)
    assert again.returncode == 0 and digest in again.stdout
    refused = prepared(packages, data, "--digest", "0" * 64)
    assert refused.returncode == 1 and "and --digest 0000" in refused.stderr


def train(runs: Path, curves: Path, plan: str, *more: str) -> subprocess.CompletedProcess[str]:
    rates = [word for model in ("ordinary", "mhc") for word in ("--rate", f"{model}=0.01")]
    arguments = ["tiny", "--plan", plan, "--runs", runs, "--curves", curves, *rates, *more]
    return script("run.py", *arguments)


def kept(curves: Path, plan: str, model: str) -> dict[str, Any]:
    (file,) = (curves / "tiny" / plan).glob(f"{model}-*.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def ablations(data: Path, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The curves of three ablations."""
    curves = tmp_path_factory.mktemp("curves")
    models = ("mhc_fast", "mhc_static", "mhc_zero_random")
    done = train(runs, curves, "ablations", "--models", *models)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 runs are done" in done.stdout
    return curves


def test_a_run_in_pieces_has_the_curves_of_a_whole_one_digit_for_digit(
    ablations: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").symlink_to(data.parent)
    command = ("ablations", "--models", "mhc_fast", "--exit-interval", "10")
    for piece, steps in enumerate((10, 16)):
        done = train(tmp_path, tmp_path / "curves", *command)
        assert done.returncode == 0, done.stdout + done.stderr
        is_last = piece == 1
        assert f"{int(is_last)} of 1 runs are done" in done.stdout
        parts = kept(tmp_path / "curves", "ablations", "mhc_fast")
        assert (parts["steps"], parts["state"]) == (steps, "finished" if is_last else "stopped")
    whole = kept(ablations, "ablations", "mhc_fast")
    for name in ("loss", "gradient_norm", "validation", "logged", "updates", "last"):
        assert parts[name] == whole[name], name
    assert len(whole["loss"]) == 16 and None not in whole["loss"]
    assert [step for step, _ in whole["validation"]] == [4, 8, 12, 16]


def test_what_is_finished_in_the_curves_is_not_trained_again(
    ablations: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").symlink_to(data.parent)
    done = train(tmp_path, ablations, "ablations", "--models", "mhc_fast", "mhc_static")
    assert "2 of 2 runs are done" in done.stdout and ": finished in" not in done.stdout


def test_static_coefficients_do_not_move_phi_and_a_factor_makes_the_steps_larger(
    ablations: Path, data: Path, runs: Path
) -> None:
    done = train(runs, ablations, "moe", "--models", "moe_mhc")
    assert done.returncode == 0, done.stdout + done.stderr
    usual, static, fast = (
        {line["step"]: line["groups"] for line in kept(ablations, plan, model)["updates"]}
        for plan, model in (
            ("moe", "moe_mhc"),
            ("ablations", "mhc_static"),
            ("ablations", "mhc_fast"),
        )
    )
    parts = ("pre", "post", "res")
    names = {f"{name}_{part}" for name in ("phi", "alpha", "bias") for part in parts}
    assert set(usual[2]) == set(fast[2]) == names
    assert set(static[2]) == names - {f"phi_{part}" for part in parts}
    # the first step that moves is one rate long for each element whose gradient eps does not hide
    step = min(step for step, groups in usual.items() if groups["bias_post"][2])
    assert usual[step]["bias_post"][2] <= 1.0 and usual[step]["bias_post"][3] == 0
    assert fast[step]["bias_post"][2] > 5
    assert fast[step]["phi_post"][2] <= 1.001  # Adam's own, rounded to three digits


def test_streams_of_init_zero_part_where_phi_starts_at_random(ablations: Path) -> None:
    run = kept(ablations, "ablations", "mhc_zero_random")
    # exactly 0 at every step where phi starts at zero: equal streams, however they are mixed
    assert run["updates"][-1]["groups"]["bias_res"][0] > 0


def test_every_validation_reads_the_same_samples(data: Path, runs: Path, tmp_path: Path) -> None:
    """A model that does not learn has one loss on them; on others it has another one."""
    more = ("--models", "moe_ordinary", "--rate", "ordinary=1e-30")
    done = train(runs, tmp_path, "moe", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [loss for _, loss in kept(tmp_path, "moe", "moe_ordinary")["validation"]]
    assert len(losses) == 4 and len(set(losses)) == 1
    assert len(set(kept(tmp_path, "moe", "moe_ordinary")["loss"])) > 10


def test_the_report_of_real_curves(ablations: Path) -> None:
    printed = script("report.py", ablations / "tiny")
    assert printed.returncode == 0, printed.stderr
    assert "### Ablations" in printed.stdout and "### Streams" in printed.stdout
    assert re.search(r"\| mhc_static \| 0.01 \| finished \| \d\.\d{4} \| – \|", printed.stdout)


def test_a_plan_without_rates_asks_for_the_sweep(data: Path, runs: Path, tmp_path: Path) -> None:
    done = script("run.py", "tiny", "--plan", "main", "--runs", runs, "--curves", tmp_path)
    assert done.returncode == 1
    assert "run --plan sweep first, or give --rate ordinary=RATE" in done.stderr


def test_a_plan_takes_the_best_rate_of_the_sweep(
    ablations: Path, data: Path, runs: Path, tmp_path: Path
) -> None:
    made = kept(ablations, "ablations", "mhc_static")
    made["data"]["digest"] = json.loads((data / "data.json").read_text())["digest"]
    folder = tmp_path / "tiny" / "sweep"
    folder.mkdir(parents=True)
    for rate, loss in ((1e-3, 5.0), (4e-3, 4.0)):
        one = made | {"plan": "sweep", "model": "mhc", "learning_rate": rate}
        (folder / f"{rate}.json").write_text(json.dumps(one | {"validation": [[16, loss]]}))
    # a budget that is spent already: nothing starts
    command = ["tiny", "--plan", "main", "--models", "mhc", "--budget", "1", "--runs", runs]
    done = script("run.py", *command, "--curves", tmp_path)
    assert "0 of 3 runs are done" in done.stdout, done.stdout + done.stderr
    commands = module("study.commands")
    jobs = [job for job in module("study.plans").PLANS["main"] if job.model == "mhc"]
    study = module("study.results")
    found = study.Study(list(map(study.Result, module("study.curves").load(tmp_path))))
    assert {commands.rate_of(job, found.best_rates()) for job in jobs} == {4e-3}


WORKS = """
import signal, sys, time
def end(*_):
    print("exiting program after receiving SIGTERM.", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, {handler})
print("ready", flush=True)
time.sleep({seconds})
"""


@pytest.mark.parametrize(
    ("handler", "seconds", "state"),
    [("end", 60, "stopped"), ("signal.SIG_IGN", 60, "stopped"), ("end", 0, "finished")],
)
def test_a_budget_stops_what_runs(handler: str, seconds: int, state: str, tmp_path: Path) -> None:
    schedule, study_runs = module("study.schedule"), module("study.runs")

    class Made(study_runs.Run):
        def command(self) -> list[str]:
            return [sys.executable, "-c", WORKS.format(handler=handler, seconds=seconds)]

    run = Made(tmp_path / "run", {"model": "made"}, [])
    start = time.monotonic()
    budget = schedule.Budget(end=start + 2, save=1)
    assert schedule.Schedule([run], [{}], budget).train()
    assert run.state == state
    # stopped after 2 seconds, killed after 3; the rest is for a machine that others use too
    assert time.monotonic() - start < 15
