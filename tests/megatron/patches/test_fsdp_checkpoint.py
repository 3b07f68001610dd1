"""Checkpoints of Megatron-FSDP (`fsdp_dtensor`): they resume exactly, and settings are checked."""

from pathlib import Path

import pytest

from megatron_mhc.patches.supported_versions import is_installed
from tests.megatron.common.cases import parameters
from tests.megatron.common.converting import command
from tests.megatron.common.flags import MOE, RESUMED, SCRIPT, SOURCE, SPEC, STAND_IN, losses
from tests.megatron.common.launch import forked_run
from tests.megatron.patches.test_legacy_checkpoint import OTHERS

PLAIN = [flag for flag in RESUMED if flag not in ("--bf16", "--mhc")]
FSDP = [
    *("--use-megatron-fsdp", "--use-distributed-optimizer", "--ckpt-format", "fsdp_dtensor"),
    "--untie-embeddings-and-output-weights",
    *("--overlap-grad-reduce", "--overlap-param-gather"),
]
BF16 = ["--bf16"]
FP32 = ["--no-gradient-reduce-div-fusion"]
"""Megatron's default is a sum that NCCL alone can scale; not in bf16."""
CASES: dict[str, tuple[int, str, list[str]]] = {
    "bf16": (2, "optim_grads_params", BF16),
    "fp32": (2, "optim_grads_params", []),
    "learned head": (2, "optim_grads", [*BF16, "--mhc-convention", "deepseek_v4"]),
    "recompute": (2, "optim_grads", ["--mhc-recompute", "1"]),
    "optimizer alone": (2, "optim", BF16),
    "nothing sharded": (2, "no_shard", BF16),
    "swiglu": (2, "optim_grads_params", ["--swiglu", "--disable-bias-linear", *BF16]),
    "experts": (2, "optim_grads_params", [*BF16, *MOE, "--disable-bias-linear"]),
    "tensor parallel": (
        4,
        "optim_grads_params",
        ["--tensor-model-parallel-size", "2", "--sequence-parallel", *BF16],
    ),
}


def train(processes: int, flags: list[str]) -> tuple[list[str], str]:
    """Run the example's script: the losses, and all that it prints with its exit status."""
    own = [] if "--bf16" in flags else FP32
    status, printed = forked_run(processes, SCRIPT, *PLAIN, *FSDP, *own, *flags)
    return losses(printed), f"{printed}\nended with {status}"


THOROUGH = (
    *("bf16", "fp32", "optimizer alone", "nothing sharded", "recompute", "experts"),
    "tensor parallel",  # four processes
)


@pytest.mark.parametrize("case", parameters(CASES, THOROUGH))
def test_resuming_is_exact(case: str, tmp_path: Path) -> None:
    processes, strategy, flags = CASES[case]
    flags = ["--mhc", *flags, "--data-parallel-sharding-strategy", strategy]
    whole, printed = train(processes, [*flags, "--save", str(tmp_path), "--save-interval", "3"])
    assert len(whole) == 7, printed[-3000:]
    assert float(whole[-1]) < float(whole[0]) - 0.1, "it does not train"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    got, printed = train(processes, [*flags, "--load", str(tmp_path)])
    assert len(got) == 4, printed[-3000:]
    # the second loss that Megatron logs after a start is the mean of the first two
    assert [got[0], *got[2:]] == [whole[3], *whole[5:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints are that several tests load."""
    return tmp_path_factory.mktemp("fsdp")


def saved(folder: Path, flags: list[str]) -> str:
    """The folder of a checkpoint after one iteration."""
    source = folder / "-".join(["saved", *flags])
    if not source.exists():
        save = ["--save", str(source), "--save-interval", "1", "--exit-interval", "1"]
        got, printed = train(1, [*flags, *save])
        assert len(got) == 1, printed[-3000:]
    return str(source)


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(["--load"], id="load"),
        # without --load Megatron stops over a path of its own
        pytest.param(
            ["--load", "nowhere", "--pretrained-checkpoint"],
            id="pretrained",
            marks=pytest.mark.thorough,
        ),
    ],
)
@pytest.mark.parametrize("other", OTHERS)
def test_other_settings_are_refused(other: str, load: list[str], folder: Path) -> None:
    before, after, message = OTHERS[other]
    got, printed = train(1, [*after, "--no-load-optim", *load, saved(folder, before)])
    assert not got and "CheckpointSettingsError: the checkpoint " in printed, printed[-3000:]
    assert message in printed


def test_megatron_itself_would_load_them(folder: Path) -> None:
    """It passes over parameters that the model has not, and knows nothing of our settings."""
    off = {"MEGATRON_MHC_PATCHES": "-checkpoint-load-state"}
    command = [SCRIPT, *PLAIN, *FSDP, *FP32, "--finetune", "--load", saved(folder, ["--mhc"])]
    for after in ([], ["--mhc", "--mhc-sinkhorn-iterations", "3"]):
        status, printed = forked_run(1, *command, *after, **off)
        assert status == 0 and len(losses(printed)) == 7, printed[-3000:]


def test_the_spec_route_saves_and_checks_too(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(STAND_IN + SOURCE)
    command = [str(script), *PLAIN, *FSDP, *FP32, *SPEC]
    save = ["--save", str(tmp_path), "--save-interval", "7"]
    status, printed = forked_run(1, *command, *save, runner=False, MHC_NUM_STREAMS="2")
    assert status == 0 and len(losses(printed)) == 7, printed[-3000:]
    status, printed = forked_run(1, *command, "--load", str(tmp_path), runner=False)
    assert status == 1 and "(with --spec: MHC_NUM_STREAMS=2)" in printed, printed[-2000:]


@pytest.mark.skipif(is_installed("<0.19"), reason="Megatron takes no arguments from this format")
def test_settings_come_from_the_checkpoint(tmp_path: Path) -> None:
    settings = ["--mhc-num-streams", "2", "--mhc-sinkhorn-iterations", "3"]
    save = ["--save", str(tmp_path), "--save-interval", "3"]
    whole, printed = train(1, ["--mhc", *settings, *save])
    assert len(whole) == 7, printed[-3000:]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    got, printed = train(1, ["--use-checkpoint-args", "--load", str(tmp_path)])
    assert [got[0], *got[2:]] == [whole[3], *whole[5:]], printed[-3000:]


def test_convert_refuses_this_format(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as refused:
        command(monkeypatch, saved(folder, []), tmp_path / "target")
    message = str(refused.value.code)
    assert "(--ckpt-format fsdp_dtensor), and convert knows torch_dist alone: give one" in message
    assert "\n" not in message and not list(tmp_path.iterdir())


DECAYED = """
import atexit
from megatron.training import training

_make = training.get_megatron_optimizer


def _get_megatron_optimizer(*args, **kwargs):
    optimizer = _make(*args, **kwargs)
    (wrapper,) = args[1]
    atexit.register(_print_groups, optimizer, wrapper)
    return optimizer


def _print_groups(optimizer, wrapper):
    names = {p: n for n, p in wrapper.param_and_grad_buffer.optimizer_named_parameters}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            print("decayed:", names[parameter], group["weight_decay"], parameter.dtype, flush=True)


training.get_megatron_optimizer = _get_megatron_optimizer
"""


def test_no_weight_decay_for_mhcs_parameters_after_a_resume(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(DECAYED + SOURCE)
    command = [str(script), *PLAIN, *FSDP, "--mhc", *BF16]
    command += ["--data-parallel-sharding-strategy", "optim_grads_params"]
    save = ["--save", str(tmp_path), "--save-interval", "3", "--exit-interval", "3"]
    for more in (save, ["--load", str(tmp_path)]):
        status, printed = forked_run(1, *command, *more)
        assert status == 0, printed[-3000:]
        lines = [line.split()[1:] for line in printed.splitlines() if line.startswith("decayed:")]
        ours = {name: rest for name, *rest in lines if "_connection." in name}
        assert len(ours) == 2 * 2 * 3  # phi, alpha and bias of four sites
        assert set(map(tuple, ours.values())) == {("0.0", "torch.float32")}
        assert {decay for name, decay, _ in lines if name not in ours} == {"0.0", "0.1"}
