"""Checkpoints of one file a rank (`--ckpt-format torch`): they resume, and settings are checked."""

from pathlib import Path

import pytest

from tests.megatron.common.cases import parameters
from tests.megatron.common.flags import DISTRIBUTED as OVERLAPPED
from tests.megatron.common.flags import MOE, RESUMED, SCRIPT, SOURCE, SPEC, STAND_IN, losses
from tests.megatron.common.launch import forked_run

PLAIN = [flag for flag in RESUMED if flag not in ("--bf16", "--mhc")]
LEGACY = ["--ckpt-format", "torch"]
DISTRIBUTED = ["--use-distributed-optimizer"]
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"
BF16 = ["--bf16"]
# a scale that fits from the first step on, and doubles every second one
FP16 = ["--fp16", "--initial-loss-scale", "256", "--loss-scale-window", "2"]
CASES: dict[str, tuple[int, list[str]]] = {
    "bf16": (1, [*LEGACY, *BF16]),
    "fp16": (1, [*LEGACY, *FP16]),
    "fp32 distributed": (2, [*LEGACY, *DISTRIBUTED]),
    "bf16 distributed, both overlaps": (2, [*LEGACY, *BF16, *OVERLAPPED]),
    "fp16 distributed": (2, [*LEGACY, *FP16, *DISTRIBUTED]),
    "bf16 distributed, experts": (
        2,
        [
            *(*LEGACY, *BF16, *DISTRIBUTED, *MOE, "--disable-bias-linear"),
            *("--expert-model-parallel-size", "2"),
        ],
    ),
    # what test_checkpoint.py does in bf16
    "fp16 torch_dist": (1, FP16),
    "fp16 torch_dist, distributed": (2, [*FP16, *DISTRIBUTED]),
}
THOROUGH = tuple(name for name in CASES if name not in ("bf16", "bf16 distributed, both overlaps"))
CONVERSIONS: dict[str, tuple[list[str], str]] = {
    "torch_dist to torch": (BF16, "torch"),
    "fully reshardable to torch": ([*FP16, RESHARDABLE], "torch"),
    "torch to torch_dist": ([*FP16, *LEGACY], "torch_dist"),
}
THOROUGH_CONVERSIONS = ("torch_dist to torch", "fully reshardable to torch")


def train(processes: int, flags: list[str]) -> tuple[list[str], str]:
    """Run the example's script with mHC if a flag says so: the losses and all that it prints."""
    _, printed = forked_run(processes, SCRIPT, *PLAIN, *flags)
    return losses(printed), printed


def whole(processes: int, flags: list[str], folder: Path) -> list[str]:
    """The losses of seven iterations with a checkpoint after the third, which is the last one."""
    save = ["--save", str(folder), "--save-interval", "3"]
    got, printed = train(processes, ["--mhc", *flags, *save])
    assert len(got) == 7, printed[-3000:]
    assert float(got[-1]) < float(got[0]) - 0.1, "it does not train"
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return got


def assert_resumes(processes: int, flags: list[str], folder: Path, losses: list[str]) -> None:
    """From the folder's checkpoint on, the losses are those of the run that did not stop."""
    got, printed = train(processes, ["--mhc", *flags, "--load", str(folder)])
    assert len(got) == 4, printed[-3000:]
    # the second loss that Megatron logs after a start is the mean of the first two
    assert [got[0], *got[2:]] == [losses[3], *losses[5:]]


@pytest.mark.parametrize("case", parameters(CASES, THOROUGH))
def test_resuming_is_exact(case: str, tmp_path: Path) -> None:
    processes, flags = CASES[case]
    losses = whole(processes, flags, tmp_path)
    assert_resumes(processes, flags, tmp_path, losses)


@pytest.mark.parametrize("conversion", parameters(CONVERSIONS, THOROUGH_CONVERSIONS))
def test_a_converted_checkpoint_resumes(conversion: str, tmp_path: Path) -> None:
    flags, after = CONVERSIONS[conversion]
    flags = [*DISTRIBUTED, *flags]
    losses = whole(2, flags, tmp_path)
    convert = ["--ckpt-convert-format", after, "--ckpt-convert-save", str(tmp_path / "new")]
    _, printed = train(2, ["--mhc", *flags, "--load", str(tmp_path), *convert])
    assert "> converted checkpoint:" in printed, printed[-3000:]
    assert_resumes(2, [*flags, "--ckpt-format", after], tmp_path / "new" / after, losses)


OTHERS: dict[str, tuple[list[str], list[str], str]] = {
    "mhc without": (
        ["--mhc", "--mhc-num-streams", "2"],
        [],
        "is of a model with mHC and this model has none: add --mhc"
        " --mhc-num-streams 2 --mhc-sinkhorn-iterations 20 --mhc-convention paper",
    ),
    "ordinary with": ([], ["--mhc"], "has no mHC in it and the model has"),
    "fewer streams": (
        ["--mhc"],
        ["--mhc", "--mhc-num-streams", "2"],
        "num_streams is 4 there and 2 here. Give the checkpoint's: --mhc-num-streams 4",
    ),
    "fewer iterations": (
        ["--mhc"],
        ["--mhc", "--mhc-sinkhorn-iterations", "3"],
        "sinkhorn_iterations is 20 there and 3 here",
    ),
}


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(["--load"], id="load", marks=pytest.mark.thorough),
        pytest.param(["--no-load-optim", "--load"], id="model alone"),
        pytest.param(["--pretrained-checkpoint"], id="pretrained", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("other", OTHERS)
def test_other_settings_are_refused(other: str, load: list[str], folder: Path) -> None:
    before, after, message = OTHERS[other]
    source = folder / "-".join(["saved", *before])
    if not source.exists():
        save = ["--save", str(source), "--save-interval", "1", "--exit-interval", "1"]
        got, printed = train(1, [*LEGACY, *before, *save])
        assert len(got) == 1, printed[-3000:]
    got, printed = train(1, [*LEGACY, *after, *load, str(source)])
    assert not got and "CheckpointSettingsError: the checkpoint " in printed, printed[-3000:]
    assert message in printed


# what inference scripts do: Megatron then swallows whatever the model says of the state
FORGIVING = f"""
{SOURCE.split("if __name__")[0]}
from megatron.training.checkpointing import load_checkpoint
from megatron.training import training

args = parse_and_validate_args()
from megatron.training.initialize import initialize_megatron
initialize_megatron()
config, provider = describe_model(args)
if provider is None:
    from megatron.training.models.gpt import GPTModelBuilder
    from megatron.core.process_groups_config import ProcessGroupCollection
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = [GPTModelBuilder(gpt_config_from_args(args)).build_model(groups)]
else:
    model = training.get_model(provider, wrap_with_ddp=False)
load_checkpoint(ddp_model=model, optimizer=None, opt_param_scheduler=None, strict=False)
print("loaded it")
"""


def saved(folder: Path, *flags: str) -> str:
    """The folder of a legacy checkpoint after one iteration."""
    save = ["--save", str(folder), "--save-interval", "1", "--exit-interval", "1"]
    got, printed = train(1, [*LEGACY, *flags, *save])
    assert len(got) == 1, printed[-3000:]
    return str(folder)


def test_a_forgiving_load_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sample.py").write_text(FORGIVING)
    load = [str(tmp_path / "sample.py"), *PLAIN, *LEGACY, "--load"]
    load += [saved(tmp_path / "saved", "--mhc"), "--mhc"]
    status, printed = forked_run(1, *load, "--mhc-num-streams", "2")
    assert status == 1 and "num_streams is 4 there and 2 here" in printed, printed[-2000:]
    status, printed = forked_run(1, *load)
    assert status == 0 and "loaded it" in printed, printed[-2000:]


def test_the_spec_route_checks_too(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(STAND_IN + SOURCE)
    command = [str(script), *PLAIN, *LEGACY, *SPEC]
    command += ["--no-load-optim", "--load"]
    ordinary, mhc = saved(tmp_path / "ordinary"), saved(tmp_path / "mhc", "--mhc")
    status, printed = forked_run(1, *command, ordinary, runner=False)
    assert status == 1 and "has no mHC in it and the model has" in printed, printed[-2000:]
    status, printed = forked_run(1, *command, mhc, runner=False, MHC_NUM_STREAMS="2")
    assert status == 1 and "(with --spec: MHC_NUM_STREAMS=4)" in printed, printed[-2000:]


@pytest.mark.thorough
def test_other_settings_are_refused_in_a_non_persistent_checkpoint(tmp_path: Path) -> None:
    every = ["--non-persistent-ckpt-type", "global", "--non-persistent-save-interval", "1"]
    save = ["--save", str(tmp_path), "--save-interval", "100", "--load", str(tmp_path)]
    got, printed = train(1, ["--mhc", *every, *save, "--train-iters", "2"])
    assert len(got) == 2, printed[-3000:]
    got, printed = train(1, [*every, *save, "--no-load-optim"])
    assert not got and "is of a model with mHC and this model has none" in printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints are that are refused."""
    return tmp_path_factory.mktemp("legacy")
