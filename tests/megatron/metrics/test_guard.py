"""--mhc-log-interval and --mhc-guard in Megatron's own training loop, and what is refused."""

import argparse
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from megatron_mhc.metrics.guard import site_name, violations
from megatron_mhc.metrics.monitor import METRICS_FILE
from megatron_mhc.start.flags import add_mhc_arguments, prepare_arguments
from tests.megatron.common.flags import RUN, SCRIPT, TINY, losses
from tests.megatron.common.launch import RUNNER, forked_python, forked_run

COUNTING = """
import sys
from megatron.training import training
from torch.utils._python_dispatch import TorchDispatchMode
sys.path.insert(0, "examples")

class Count(TorchDispatchMode):
    operations = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        Count.operations += 1
        return function(*args, **(kwargs or {}))

step, trained = [0], training.train_step
def train_step(*args, **kwargs):
    Count.operations, step[0] = 0, step[0] + 1
    with Count():
        result = trained(*args, **kwargs)
    print(f"operations of step {step[0]}: {Count.operations}", flush=True)
    return result
training.train_step = train_step

import pretrain_gpt
pretrain_gpt.main()
"""
LONGER = ["--train-iters", "5"]


def operations(printed: str) -> list[int]:
    """How many tensor operations each training step ran."""
    return [int(count) for count in re.findall(r"operations of step \d+: (\d+)", printed)]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run with metrics at steps 1, 3 (and 6): its folder, output, and a run without them."""
    folder = tmp_path_factory.mktemp("run")
    script = folder / "count.py"
    script.write_text(COUNTING)
    run = [*RUNNER, str(script), *TINY, *LONGER, "--mhc"]
    tensorboard = ["--tensorboard-dir", str(folder), "--tensorboard-log-interval", "1"]
    result = forked_python(*run, *tensorboard, "--mhc-log-interval", "3")
    assert result.returncode == 0, result.stdout[-3000:]
    plain = forked_python(*run)
    assert plain.returncode == 0, plain.stdout[-3000:]
    return folder, result.stdout, plain.stdout


Logged = tuple[Path, str, str]


def test_nothing_is_computed_at_other_steps(logged: Logged) -> None:
    _, printed, plain = logged
    with_metrics, without = operations(printed), operations(plain)
    assert len(with_metrics) == len(without) == 5
    assert [with_metrics[i] for i in (1, 3, 4)] == [without[i] for i in (1, 3, 4)]
    assert all(with_metrics[i] > without[i] + 50 for i in (0, 2))


def test_recording_changes_no_loss(logged: Logged) -> None:
    _, printed, plain = logged
    assert len(losses(printed)) == 5 and losses(printed) == losses(plain)


def test_what_is_written(logged: Logged) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, printed, _ = logged
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in log.Tags()["scalars"] if tag.startswith("mhc/")]
    for tag, values in {
        "mhc/gradient_norm": [line["gradient_norm"] for line in lines],
        "mhc/gain_forward_max": [line["site"]["depth_gain_forward_max"][-1] for line in lines],
        "mhc/gain_backward_mean": [line["site"]["depth_gain_backward_mean"][0] for line in lines],
        "mhc/site_002/h_pre_1": [line["site"]["h_pre"][2][1] for line in lines],
    }.items():
        events = log.Scalars(tag)
        assert [event.step for event in events] == [1, 3]
        # TensorBoard keeps fp32: half a unit in its last place is 6e-8
        assert [event.value for event in events] == pytest.approx(values, rel=1e-7), tag
    # 5 of the model; a site: 22 numbers and 3 lists of 4
    assert len(tags) == 5 + 4 * (len(lines[0]["site"]) - 3 + 3 * 4)
    start = lines[0]["site"]
    # the paths to wait for: at the start mHC's composite gain is 1, and streams are equal
    # 4 sites, whose rows' sums fp32 misses by 2e-7 each; a cosine of a few roundings of 6e-8
    assert start["depth_gain_forward_mean"][-1] == pytest.approx(1, abs=8e-7)
    assert start["stream_cosine"][0] == pytest.approx(1, abs=3e-7)
    assert len(re.findall(r"^> mHC at step \d: composite gain forward 1\.", printed, re.M)) == 2


INJECTED = ["--error-injection-rate", "1", "--error-injection-type", "transient_error"]


def test_a_step_that_megatron_runs_twice_is_written_once(tmp_path: Path) -> None:
    """Its rerun state machine does to validate a result, and then ends the run (status 17)."""
    flags = ["--mhc", "--mhc-log-interval", "2", "--tensorboard-dir", str(tmp_path)]
    status, printed = forked_run(1, SCRIPT, *TINY, *flags, *INJECTED)
    assert status == 17 and "Need to rerun step to check reproducibility" in printed
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert re.findall(r"^> mHC at step (\d)", printed, re.M) == ["1", "2"]


HC = ["--mhc", "--mhc-variant", "hc", "--mhc-log-interval", "1", "--mhc-guard-gain", "1"]
# a seed with which gains rise at once; with others they fall first
HC += ["--seed", "4"]


def test_the_guard_warns_and_names_the_layer() -> None:
    result = forked_python(*RUN, *HC, "--mhc-guard", "warn")
    assert result.returncode == 0, result.stdout[-3000:]
    assert len(losses(result.stdout)) == 3
    warnings = re.findall(r"^WARNING: mHC's guard at step (\d): (.*)$", result.stdout, re.M)
    # at the start every H_res is the identity, whose gain is the bound itself
    assert [step for step, _ in warnings] == ["2", "3"]
    message = r"the composite forward gain of H_res over 4 sites is 1\.\d+ \(bound 1\), passed at"
    assert re.search(message + r" site \d \(layer [12], (attention|MLP)\); ", warnings[0][1])


def test_the_guard_stops_every_rank_before_the_update() -> None:
    stages = ["--pipeline-model-parallel-size", "2", "--num-layers", "4"]
    status, printed = forked_run(2, SCRIPT, *TINY, *HC, *stages, "--mhc-guard", "stop")
    assert status == 1
    assert "megatron_mhc.metrics.guard.GuardError: mHC's guard at step 2: the composite" in printed
    assert "over 8 sites" in printed and "Stopped before this step's update" in printed


def quiet(sites: int = 4, variant: str = "mhc") -> dict[str, Any]:
    """The metrics of a model whose H_res are identities."""
    names = [f"{part}gain_{way}_max" for part in ("", "depth_") for way in ("forward", "backward")]
    values = {name: [1.0] * sites for name in names}
    return {
        "sites": list(range(sites)),
        "variant": variant,
        "site": {**values, "row_error": [0.0] * sites},
    }


def test_the_guards_sentences() -> None:
    assert violations(quiet(), 100.0) == []
    metrics = quiet()
    metrics["site"]["depth_gain_forward_max"] = [1.0, 50.0, 150.0, 300.0]
    metrics["site"]["gain_forward_max"] = [1.0, 50.0, 3.0, 2.0]
    metrics["site"]["depth_gain_backward_max"] = [300.0, 200.0, 6.0, 2.0]
    metrics["site"]["gain_backward_max"] = [1.5, 50.0, 3.0, 2.0]
    assert violations(metrics, 100.0) == [
        "the composite forward gain of H_res over 4 sites is 300 (bound 100), passed at site 2"
        " (layer 2, attention); the largest gain of one site is 50 at site 1 (layer 1, MLP)",
        "the composite backward gain of H_res over 4 sites is 300 (bound 100), passed at site 1"
        " (layer 1, MLP); the largest gain of one site is 50 at site 1 (layer 1, MLP)",
    ]


def test_the_guard_sees_rows_and_what_is_no_number() -> None:
    metrics = quiet()
    metrics["site"]["row_error"][3] = 0.25
    sentence = "a row of H_res at site 3 (layer 2, MLP) misses the sum 1 by 0.25 (bound 0.001)"
    assert violations(metrics, 100.0) == [sentence]
    assert violations({**metrics, "variant": "hc"}, 100.0) == [], "rows of HC have no sum to keep"
    metrics["site"]["row_error"][3] = float("nan")
    assert len(violations(metrics, 100.0)) == 1
    metrics = quiet()
    metrics["site"]["depth_gain_forward_max"][2:] = [float("nan")] * 2
    (sentence,) = violations(metrics, 100.0)
    assert f"is nan (bound 100), passed at {site_name(2)}" in sentence


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mhc-log-interval 10", "--mhc-log-interval given without --mhc: add --mhc"),
        ("--mhc-guard warn", "--mhc-guard given without --mhc"),
        ("--mhc --mhc-log-interval -1", "--mhc-log-interval is -1; expected 0"),
        ("--mhc --mhc-guard stop", "--mhc-guard stop looks at the steps that --mhc-log-interval"),
        ("--mhc --mhc-log-interval 1 --mhc-guard-gain 5", "add --mhc-guard warn"),
        (
            "--mhc --mhc-log-interval 1 --mhc-guard warn --mhc-guard-gain 0.5",
            "--mhc-guard-gain is 0.5; expected at least 1",
        ),
    ],
)
def test_flags_that_cannot_work_are_refused(flags: str, message: str) -> None:
    parser = add_mhc_arguments(argparse.ArgumentParser())
    parser.add_argument("--spec", nargs="*")
    with pytest.raises(ValueError, match=message):
        prepare_arguments(parser.parse_args(flags.split()))


def test_metrics_that_no_file_gets_are_told() -> None:
    parser = add_mhc_arguments(argparse.ArgumentParser())
    parser.add_argument("--spec", nargs="*")
    parser.add_argument("--tensorboard-dir")
    flags = ["--mhc", "--mhc-log-interval", "5"]
    with pytest.warns(UserWarning, match=r"mhc_metrics.jsonl, .* is not written"):
        prepare_arguments(parser.parse_args(flags))
    with warnings.catch_warnings(action="error"):
        prepare_arguments(parser.parse_args([*flags, "--tensorboard-dir", "here"]))


def test_metrics_without_their_patch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_MHC_PATCHES", "-metrics")
    parser = add_mhc_arguments(argparse.ArgumentParser())
    parser.add_argument("--spec", nargs="*")
    with pytest.raises(ValueError, match="needs the patch 'metrics', which MEGATRON_MHC_PATCHES"):
        prepare_arguments(parser.parse_args(["--mhc", "--mhc-log-interval", "5"]))


def test_a_script_of_ones_own_has_no_flag_to_turn_it_on() -> None:
    """Megatron's `--spec` route: settings are environment variables, and this is none of them."""
    from megatron_mhc.start.environment import config_from_environment

    with pytest.raises(ValueError, match="MHC_LOG_INTERVAL is set; known are"):
        config_from_environment({"MHC_LOG_INTERVAL": "10"})
