"""`--use-checkpoint-args`: a run that takes its arguments from a checkpoint goes on as it was."""

from pathlib import Path

import pytest

from tests.megatron.common.flags import RESUMED, SOURCE, losses
from tests.megatron.common.launch import forked_run

PLAIN = [flag for flag in RESUMED if flag != "--mhc"]
OWN_SPECS = """
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

class Norm(torch.nn.Module):
    def __init__(self, config, hidden_size, eps):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))

    def forward(self, x):
        return self.weight * x / (x.abs().amax(-1, keepdim=True) + 1)

def base(config):
    spec = get_gpt_layer_local_spec()
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    return spec
"""
BASE = ["--spec", "my_specs", "base"]
SETTINGS = ["--mhc-num-streams", "2", "--mhc-sinkhorn-iterations", "3"]
SPEC_ROUTE = {"MHC_NUM_STREAMS": "2", "MHC_SINKHORN_ITERATIONS": "3"}
USE = "--use-checkpoint-args"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the script is, with specs of its own beside it, and checkpoints."""
    path = tmp_path_factory.mktemp("arguments")
    (path / "my_specs.py").write_text(OWN_SPECS)
    (path / "train.py").write_text(f"import sys\nsys.path.insert(0, {str(path)!r})\n{SOURCE}")
    return path


def train(
    folder: Path, *flags: str, runner: bool = True, **environment: str
) -> tuple[list[str], str]:
    """The losses of a run, and all that it prints."""
    script = (str(folder / "train.py"), *PLAIN)
    _, printed = forked_run(1, *script, *flags, runner=runner, **environment)
    return losses(printed), printed


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[str]:
    """The losses of a run around a spec of its own, with a checkpoint after three steps."""
    save = ["--save", str(folder / "own"), "--save-interval", "3"]
    got, printed = train(folder, "--mhc", *SETTINGS, *BASE, *save)
    assert len(got) == 7, printed[-3000:]
    (folder / "own" / "latest_checkpointed_iteration.txt").write_text("3")
    return got


@pytest.mark.parametrize(
    "flags",
    [
        ["--mhc", *SETTINGS, *BASE],
        ["--mhc", *BASE],
        ["--mhc"],
        [],
        ["--spec", "megatron_mhc.spec", "gpt_layer_spec"],
    ],
    ids=["all given", "no settings", "no spec", "nothing", "ours alone"],
)
def test_a_resumed_run_computes_the_same_function(
    flags: list[str], folder: Path, whole: list[str]
) -> None:
    got, printed = train(folder, *flags, USE, "--load", str(folder / "own"))
    assert len(got) == 4, printed[-3000:]
    # the second loss that Megatron logs after a start is the mean of the first two
    assert [got[0], *got[2:]] == [whole[3], *whole[5:]]
    assert "> mHC is on: 2 streams" in printed and ", 3 Sinkhorn iterations" in printed


def test_a_setting_that_was_given_stays_and_is_refused(folder: Path, whole: list[str]) -> None:
    flags = ["--mhc", "--mhc-num-streams", "4", USE, "--load", str(folder / "own")]
    got, printed = train(folder, *flags)
    assert not got and "num_streams is 2 there and 4 here" in printed, printed[-3000:]


def test_the_spec_route_finds_the_base_spec_too(folder: Path, whole: list[str]) -> None:
    flags = [USE, "--load", str(folder / "own")]
    got, printed = train(folder, *flags, runner=False, **SPEC_ROUTE)
    assert len(got) == 4, printed[-3000:]
    assert [got[0], *got[2:]] == [whole[3], *whole[5:]]
