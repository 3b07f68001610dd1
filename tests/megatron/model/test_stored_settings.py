"""The settings in a checkpoint (torch_dist): another model than they say is refused."""

from pathlib import Path

import pytest
import torch

from megatron_mhc import MHCConfig
from megatron_mhc.model.stored_settings import CheckpointSettingsError, StoredSettings
from tests.megatron.common.converting import ORDINARY, go_on, ordinary, with_mhc
from tests.megatron.common.flags import SCRIPT, SOURCE, SPEC, STAND_IN, losses
from tests.megatron.common.launch import forked_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's checkpoints are."""
    return tmp_path_factory.mktemp("convert")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mhc", "--mhc-num-streams", "2"], "num_streams is 4 there and 2 here. Give the"),
        (["--mhc", "--mhc-sinkhorn-iterations", "3"], "--mhc-sinkhorn-iterations 20"),
        (["--mhc", "--mhc-convention", "deepseek_v4"], "convention is paper there and deepseek_v4"),
        (["--mhc", "--mhc-variant", "hc"], "variant is mhc there and hc here"),
        ([], "add --mhc --mhc-num-streams 4 --mhc-sinkhorn-iterations 20"),
    ],
)
def test_other_settings_than_the_checkpoints_are_refused(
    flags: list[str], message: str, folder: Path
) -> None:
    status, printed = forked_run(1, SCRIPT, *ORDINARY, "--load", str(with_mhc(folder)), *flags)
    assert status == 1 and "CheckpointSettingsError" in printed and message in printed


def test_an_ordinary_checkpoint_in_a_model_with_mhc_names_convert(folder: Path) -> None:
    status, printed = forked_run(
        1, SCRIPT, *ORDINARY, "--load", str(ordinary("dense", folder)), "--finetune", "--mhc"
    )
    assert status == 1 and "convert it: python -m megatron_mhc convert SOURCE TARGET" in printed


def test_the_spec_way_checks_settings_from_the_environment(folder: Path) -> None:
    (folder / "spec.py").write_text(STAND_IN + SOURCE)
    command = [str(folder / "spec.py"), *ORDINARY, "--load", str(with_mhc(folder))]
    command += SPEC
    status, printed = forked_run(1, *command, runner=False, MHC_NUM_STREAMS="2")
    assert status == 1 and "(with --spec: MHC_NUM_STREAMS=4)" in printed
    status, printed = forked_run(1, *command, runner=False)
    assert status == 0 and len(losses(printed)) == 7, printed[-3000:]


def test_harmless_settings_may_change(folder: Path) -> None:
    flags = ["--mhc-backend", "torch", "--mhc-recompute", "1", "--mhc-init", "zero"]
    start = str(with_mhc(folder))
    want = go_on("dense", with_mhc(folder), "--mhc")
    assert go_on("dense", Path(start), "--mhc", *flags) == want


def test_what_megatron_does_where_our_code_is_not_imported(folder: Path) -> None:
    """Nothing: it leaves out what it does not know, unless it is told to look."""
    off = {"MEGATRON_MHC_PATCHES": "-checkpoint-load"}
    command = [SCRIPT, *ORDINARY, "--load", str(with_mhc(folder))]
    status, printed = forked_run(1, *command, **off)
    assert status == 0 and len(losses(printed)) == 7
    status, printed = forked_run(1, *command, "--dist-ckpt-strictness", "raise_all", **off)
    assert status == 1 and "mhc_settings" in printed


def test_torchs_own_state_dict_has_the_settings() -> None:
    state = torch.nn.ModuleDict({"a": StoredSettings(MHCConfig())}).state_dict()
    torch.nn.ModuleDict({"a": StoredSettings(MHCConfig(init="zero"))}).load_state_dict(state)
    other = torch.nn.ModuleDict({"a": StoredSettings(MHCConfig(sinkhorn_iterations=5))})
    with pytest.raises(CheckpointSettingsError, match="sinkhorn_iterations is 20 there and 5 here"):
        other.load_state_dict(state)
