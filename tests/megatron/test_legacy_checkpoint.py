"""Checkpoints of one file a rank (`--ckpt-format torch`): they resume, and settings are checked."""

import re
from pathlib import Path

import pytest

from tests.megatron.launch import forked_run
from tests.megatron.test_checkpoint import DISTRIBUTED as OVERLAPPED
from tests.megatron.test_checkpoint import FLAGS, MOE

PLAIN = [flag for flag in FLAGS if flag not in ("--bf16", "--mhc")]
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
CONVERSIONS: dict[str, tuple[list[str], str]] = {
    "torch_dist to torch": (BF16, "torch"),
    "fully reshardable to torch": ([*FP16, RESHARDABLE], "torch"),
    "torch to torch_dist": ([*FP16, *LEGACY], "torch_dist"),
}


def train(processes: int, flags: list[str]) -> tuple[list[str], str]:
    """Run the example's script with mHC if a flag says so: the losses and all that it prints."""
    _, printed = forked_run(processes, "examples/pretrain_gpt.py", *PLAIN, *flags)
    return re.findall(r"iteration +\d+/.*lm loss: (\S+)", printed), printed


def whole(processes: int, flags: list[str], folder: Path) -> list[str]:
    """The losses of seven iterations with a checkpoint after the third, which is the last one."""
    save = ["--save", str(folder), "--save-interval", "3"]
    losses, printed = train(processes, ["--mhc", *flags, *save])
    assert len(losses) == 7, printed[-3000:]
    assert float(losses[-1]) < float(losses[0]) - 0.1, "it does not train"
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return losses


def assert_resumes(processes: int, flags: list[str], folder: Path, losses: list[str]) -> None:
    """From the folder's checkpoint on, the losses are those of the run that did not stop."""
    got, printed = train(processes, ["--mhc", *flags, "--load", str(folder)])
    assert len(got) == 4, printed[-3000:]
    # the second loss that Megatron logs after a start is the mean of the first two
    assert [got[0], *got[2:]] == [losses[3], *losses[5:]]


@pytest.mark.parametrize("case", CASES)
def test_resuming_is_exact(case: str, tmp_path: Path) -> None:
    processes, flags = CASES[case]
    losses = whole(processes, flags, tmp_path)
    assert_resumes(processes, flags, tmp_path, losses)


@pytest.mark.parametrize("conversion", CONVERSIONS)
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
        "the checkpoint is of a model with mHC and this model has none: add --mhc"
        " --mhc-num-streams 2 --mhc-sinkhorn-iterations 20 --mhc-convention paper",
    ),
    "ordinary with": ([], ["--mhc"], "the checkpoint has no mHC in it and the model has"),
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
    [["--load"], ["--no-load-optim", "--load"], ["--pretrained-checkpoint"]],
    ids=["load", "model alone", "pretrained"],
)
@pytest.mark.parametrize("other", OTHERS)
def test_other_settings_are_refused(other: str, load: list[str], folder: Path) -> None:
    before, after, message = OTHERS[other]
    source = folder / "-".join(["saved", *before])
    if not source.exists():
        save = ["--save", str(source), "--save-interval", "1", "--exit-interval", "1"]
        losses, printed = train(1, [*LEGACY, *before, *save])
        assert len(losses) == 1, printed[-3000:]
    losses, printed = train(1, [*LEGACY, *after, *load, str(source)])
    assert not losses and "CheckpointSettingsError: the checkpoint" in printed, printed[-3000:]
    assert message in printed


def test_other_settings_are_refused_in_a_non_persistent_checkpoint(tmp_path: Path) -> None:
    every = ["--non-persistent-ckpt-type", "global", "--non-persistent-save-interval", "1"]
    save = ["--save", str(tmp_path), "--save-interval", "100", "--load", str(tmp_path)]
    losses, printed = train(1, ["--mhc", *every, *save, "--train-iters", "2"])
    assert len(losses) == 2, printed[-3000:]
    losses, printed = train(1, [*every, *save, "--no-load-optim"])
    assert not losses and "is of a model with mHC and this model has none" in printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints are that are refused."""
    return tmp_path_factory.mktemp("legacy")
