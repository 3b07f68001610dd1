"""Other ways to turn mHC on: `auto`, Megatron's `--spec`, and what they refuse."""

from pathlib import Path

import pytest

from megatron_mhc import MHCConfig, with_mhc
from megatron_mhc.patches.supported_versions import is_installed
from tests.megatron.common.flags import BANNER, RUN, SOURCE, SPEC, STAND_IN, TINY, losses
from tests.megatron.common.launch import RUNNER, forked_python, forked_run

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
ALONE["MASTER_PORT"] = "0"


@pytest.fixture(scope="module")
def wide() -> str:
    """What the runner prints with --mhc."""
    return forked_python(*RUN, "--mhc", stage="torch").stdout


def test_auto_is_one_line_in_ones_own_script(wide: str, tmp_path: Path) -> None:
    """In a process that imports Megatron itself, as one that a user starts."""
    script = tmp_path / "train.py"
    script.write_text(f"{STAND_IN}import megatron_mhc.auto\n{SOURCE}")
    result = forked_python(str(script), *TINY, "--mhc", stage="torch", **ALONE)
    assert result.returncode == 0, result.stdout[-3000:]
    assert BANNER in result.stdout and losses(result.stdout) == losses(wide)


def spec_script(folder: Path) -> str:
    """A script that knows nothing of our flags, on the CPU."""
    script = folder / "train.py"
    script.write_text(f"{STAND_IN}{SOURCE}")
    return str(script)


def test_spec_is_megatrons_own_way(wide: str, tmp_path: Path) -> None:
    """Settings come from the environment, in a process that imports Megatron itself."""
    command = [spec_script(tmp_path), *TINY, *SPEC]
    result = forked_python(*command, stage="torch", **ALONE, MHC_NUM_STREAMS="2")
    assert result.returncode == 0, result.stdout[-3000:]
    assert "mHC is on: 2 streams" in result.stdout
    assert "(settings from environment)" in result.stdout
    assert losses(result.stdout)[0] == losses(wide)[0]


def test_torchs_fsdp_refuses_a_model_that_a_library_gave_mhc() -> None:
    """No flag of FSDP is on a TransformerConfig: Megatron's own wrapper refuses."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_mhc.model.connection import HyperConnection
    from megatron_mhc.patches.registry import locate
    from megatron_mhc.start.activate import model_patches

    with_mhc(get_gpt_layer_local_spec())
    (target,) = [patch.target for patch in model_patches() if patch.id == "torch-fsdp2"]
    wrapper, _ = locate(target)
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), HyperConnection(MHCConfig(), 4, 0))
    with pytest.raises(ValueError, match="does not work with --use-torch-fsdp2"):
        wrapper(config=config, ddp_config=DistributedDataParallelConfig(), module=model)


def test_fsdp_is_refused_with_megatrons_own_spec_flag(tmp_path: Path) -> None:
    fsdp = ["--use-torch-fsdp2", "--untie-embeddings-and-output-weights"]
    command = [spec_script(tmp_path), *TINY, *SPEC, *fsdp, "--ckpt-format", "torch_dist"]
    status, printed = forked_run(1, *command, runner=False)
    assert status != 0 and not losses(printed)
    assert "ValueError: mHC does not work with --use-torch-fsdp2" in printed


@pytest.mark.skipif(not is_installed("<0.19"), reason="Megatron 0.19 calls a spec itself")
def test_megatron_0_18_calls_no_spec_without_our_patch() -> None:
    # importing our spec applies the patch: in a process that has not
    result = forked_python(*RUN, *SPEC, stage="torch", MEGATRON_MHC_PATCHES="-spec-function")
    assert result.returncode != 0 and not losses(result.stdout)
    assert "specialize for function" in result.stdout


def test_a_spec_of_ones_own_gets_sites_too(tmp_path: Path) -> None:
    (tmp_path / "my_spec.py").write_text(
        "from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec\n"
        "def layer(config): return get_gpt_layer_local_spec(normalization='RMSNorm')\n"
    )
    path = {"PYTHONPATH": str(tmp_path)}
    norm = ["--normalization", "RMSNorm"]
    result = forked_python(*RUN, *norm, "--spec", "my_spec", "layer", "--mhc", **path)
    assert result.returncode == 0, result.stdout[-3000:]
    assert BANNER in result.stdout


@pytest.mark.parametrize("asked", ["--mhc", "--spec megatron_mhc.spec gpt_layer_spec"])
def test_a_variable_that_nobody_reads_stops_before_training(asked: str) -> None:
    result = forked_python(*RUN, *asked.split(), MHC_NUM_STREAMS="8")
    assert result.returncode != 0 and not losses(result.stdout)
    assert "megatron_mhc.run: MHC_NUM_STREAMS set in the environment" in result.stdout
    assert "Traceback" not in result.stdout


DENSE = """
import argparse, sys
from megatron_mhc.patches import cpu
import megatron.training.training as training
from megatron.training import arguments, global_vars
from examples_gpt import main

original = arguments.validate_args
def forget_spec(args, *rest):  # a script that builds its model without args.spec
    result = original(args, *rest)
    args.spec = None
    return result
arguments.validate_args = forget_spec
main()
"""


def test_a_model_that_came_out_dense_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "examples_gpt.py").write_text(SOURCE)
    (tmp_path / "dense.py").write_text(DENSE)
    result = forked_python(*RUNNER, str(tmp_path / "dense.py"), *TINY, "--mhc")
    assert result.returncode != 0 and not losses(result.stdout)
    assert "megatron_mhc.run: mHC was asked for, but these layers have none: " in result.stdout
    assert "module.decoder.layers.0, module.decoder.layers.1" in result.stdout
