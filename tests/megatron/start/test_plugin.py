"""Turning mHC on: the runner, `auto` and `--spec`, and what they refuse."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mhc import MHCConfig, with_mhc
from megatron_mhc.patches.releases import is_installed
from tests.megatron.common.launch import ROOT, forked_run

TINY = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", "16", "--max-position-embeddings", "16", "--micro-batch-size", "2"),
    *("--train-iters", "3", "--lr", "1e-2", "--log-interval", "1"),
    *("--eval-iters", "0", "--eval-interval", "10"),
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "63"),
    *("--transformer-impl", "local", "--distributed-backend", "gloo", "--disable-jit-fuser"),
    *("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-persist-layer-norm"),
    *(
        "--no-bias-gelu-fusion",
        "--no-bias-dropout-fusion",
        "--no-rope-fusion",
        "--num-workers",
        "0",
    ),
]
SCRIPT = "examples/pretrain_gpt.py"
RUN = ["-m", "megatron_mhc.run", "--cpu", SCRIPT, *TINY]


def python(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the CPU, alone; standard output and error together."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    kept |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )


def losses(result: subprocess.CompletedProcess[str]) -> list[str]:
    """The losses in Megatron's iteration log."""
    lines = [line for line in result.stdout.splitlines() if "lm loss:" in line]
    return [line.split("lm loss: ")[1].split(" |")[0] for line in lines]


BANNER = (
    "> mHC is on: 4 streams, variant mhc, convention paper, 20 Sinkhorn iterations, init residual,"
    " backend torch, because Triton needs a CUDA device and the tensors are on 'cpu'; 4 sites,"
    " 12,396 extra parameters (settings from flags)"
)


@pytest.fixture(scope="module")
def ordinary() -> subprocess.CompletedProcess[str]:
    """The runner without --mhc: Megatron as it always is."""
    return python(*RUN)


@pytest.fixture(scope="module")
def wide() -> subprocess.CompletedProcess[str]:
    """The runner with --mhc."""
    return python(*RUN, "--mhc")


def test_the_runner_trains_with_one_banner_line(
    wide: subprocess.CompletedProcess[str], ordinary: subprocess.CompletedProcess[str]
) -> None:
    assert wide.returncode == 0, wide.stdout[-3000:]
    assert wide.stdout.count("mHC is on") == 1 and BANNER in wide.stdout
    assert ordinary.returncode == 0 and "mHC is on" not in ordinary.stdout
    assert len(losses(wide)) == len(losses(ordinary)) == 3
    assert losses(wide)[0] == losses(ordinary)[0], "step 0 is the ordinary network's function"
    assert losses(wide)[2] != losses(ordinary)[2]


def test_the_runner_says_how_it_recomputes(wide: subprocess.CompletedProcess[str]) -> None:
    result = python(*RUN, "--mhc", "--mhc-recompute", "auto")
    assert result.returncode == 0, result.stdout[-3000:]
    assert (
        "12,396 extra parameters; recompute in blocks of 1 layer (auto) (what it saves is predicted"
        " for backend triton alone) (settings from flags)"
    ) in result.stdout
    assert losses(result) == losses(wide)


def test_the_runner_says_that_the_reference_gives_no_bf16_streams_back() -> None:
    result = python(*RUN, "--bf16", "--mhc", "--mhc-recompute", "1")
    assert result.returncode == 0, result.stdout[-3000:]
    assert "blocks of 1 layer gives no streams back: backend torch keeps fp32" in result.stdout


def test_auto_is_one_line_in_ones_own_script(
    wide: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "from megatron_mhc.patches import cpu\ncpu.enter()\n"
        "import megatron_mhc.auto\n" + (ROOT / SCRIPT).read_text()
    )
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    result = python(str(script), *TINY, "--mhc", **rank, MASTER_PORT="0")
    assert result.returncode == 0, result.stdout[-3000:]
    assert BANNER in result.stdout and losses(result) == losses(wide)


SAYS_ITS_PATCHES = f"""{(ROOT / SCRIPT).read_text()}
from megatron_mhc.start.activate import plugin_patches
from megatron_mhc.patches import registry
applied = [s.patch.id for s in registry.status(*plugin_patches()) if s.state == "applied"]
print("applied:", *applied, flush=True)
"""
ALONE = f"""from megatron_mhc.patches import cpu
cpu.enter()
{(ROOT / SCRIPT).read_text()}
import sys
print("plugin", "megatron_mhc.start.activate" in sys.modules)
"""
ORDINARY: dict[str, tuple[int, list[str]]] = {
    "one process": (1, ["--bf16"]),
    "virtual stages": (
        2,
        [
            *("--bf16", "--use-distributed-optimizer", "--num-layers", "4"),
            *("--pipeline-model-parallel-size", "2"),
            *("--num-layers-per-virtual-pipeline-stage", "1", "--global-batch-size", "4"),
        ],
    ),
    "multi-token prediction": (
        1,
        ["--mtp-num-layers", "1", "--position-embedding-type", "rope"],
    ),
}


def training_log(printed: str) -> list[str]:
    """Megatron's lines of every iteration (losses, norms, rates), without what a clock says."""
    # another rank may go on in the line
    lines = re.findall(r"iteration +\d+/.*?nan iterations: +\d+", printed)
    return [re.sub(r"elapsed time[^|]*\|", "", line) for line in lines]


def test_the_runner_without_the_flag_trains_as_megatron_alone(
    ordinary: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    """Beside a process that has never imported the plugin, on the CPU as the runner's is."""
    script = tmp_path / "train.py"
    script.write_text(ALONE)
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    alone = python(str(script), *TINY, **rank, MASTER_PORT="0")
    assert alone.returncode == 0 and "plugin False" in alone.stdout, alone.stdout[-3000:]
    assert len(training_log(alone.stdout)) == 3
    assert training_log(ordinary.stdout) == training_log(alone.stdout)


@pytest.mark.parametrize("case", ORDINARY)
def test_our_patches_change_no_digit_of_an_ordinary_model(case: str, tmp_path: Path) -> None:
    """Those of the optimizer, the schedule and the building of a model are on its way too."""
    from megatron_mhc.patches.cpu import SHIPPED_HELPERS
    from megatron_mhc.patches.spec_function import spec_function_patches
    from megatron_mhc.start.activate import plugin_patches

    if case == "multi-token prediction" and is_installed("<0.19"):
        pytest.skip("the script builds none of these layers with Megatron 0.18")
    script = tmp_path / "train.py"
    script.write_text(SAYS_ITS_PATCHES)
    processes, flags = ORDINARY[case]
    command = [str(script), *TINY, *flags, "--weight-decay", "0.1", "--log-params-norm"]
    (status, alone), (status_too, patched) = (
        forked_run(processes, *command, runner=runner) for runner in (False, True)
    )
    assert status == status_too == 0, alone[-3000:] + patched[-3000:]
    # the stand-in's, and what importing our spec applies with Megatron 0.18
    few = [patch.id for patch in (*spec_function_patches(), SHIPPED_HELPERS)]
    assert f"applied: {' '.join(few)}\n" in alone, alone[-3000:]
    assert f"applied: {' '.join(patch.id for patch in plugin_patches())}\n" in patched
    log = training_log(alone)
    assert len(log) == 3 and all("grad norm: " in line for line in log)
    assert training_log(patched) == log


def run_with_spec(
    folder: Path, *flags: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A script that knows nothing of our flags, on the CPU, with Megatron's `--spec`."""
    script = folder / "train.py"
    script.write_text(
        "from megatron_mhc.patches import cpu, registry\ncpu.enter()\n"
        + (ROOT / SCRIPT).read_text()
    )
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    spec = ["--spec", "megatron_mhc.spec", "gpt_layer_spec"]
    return python(str(script), *TINY, *spec, *flags, **rank, MASTER_PORT="0", **environment)


def test_spec_is_megatrons_own_way(wide: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    """Settings come from the environment."""
    result = run_with_spec(tmp_path, MHC_NUM_STREAMS="2")
    assert result.returncode == 0, result.stdout[-3000:]
    assert "mHC is on: 2 streams" in result.stdout
    assert "(settings from environment)" in result.stdout
    assert losses(result)[0] == losses(wide)[0]


@pytest.mark.parametrize("name", ["megatron-fsdp", "torch-fsdp2"])
def test_fsdp_refuses_a_model_that_a_library_gave_mhc(name: str) -> None:
    """No flag of FSDP is on a TransformerConfig: Megatron's own wrappers refuse."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_mhc.model.connection import HyperConnection
    from megatron_mhc.patches.registry import locate
    from megatron_mhc.start.activate import model_patches

    with_mhc(get_gpt_layer_local_spec())
    (target,) = [patch.target for patch in model_patches() if patch.id == name]
    wrapper, _ = locate(target)
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), HyperConnection(MHCConfig(), 4, 0))
    with pytest.raises(ValueError, match="FSDP is not tried yet; use DDP"):
        wrapper(config=config, ddp_config=DistributedDataParallelConfig(), module=model)


def test_fsdp_is_refused_with_megatrons_own_spec_flag(tmp_path: Path) -> None:
    fsdp = ["--use-torch-fsdp2", "--untie-embeddings-and-output-weights"]
    result = run_with_spec(tmp_path, *fsdp, "--ckpt-format", "torch_dist")
    assert result.returncode != 0 and not losses(result)
    assert "ValueError: mHC does not work with Megatron's FSDP wrappers" in result.stdout


@pytest.mark.skipif(not is_installed("<0.19"), reason="Megatron 0.19 calls a spec itself")
def test_megatron_0_18_calls_no_spec_without_our_patch(tmp_path: Path) -> None:
    spec = ["--spec", "megatron_mhc.spec", "gpt_layer_spec"]
    result = python(*RUN, *spec, MEGATRON_MHC_PATCHES="-spec-function")
    assert result.returncode != 0 and not losses(result)
    assert "specialize for function" in result.stdout


def test_a_spec_of_ones_own_gets_sites_too(tmp_path: Path) -> None:
    (tmp_path / "my_spec.py").write_text(
        "from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec\n"
        "def layer(config): return get_gpt_layer_local_spec(normalization='RMSNorm')\n"
    )
    path = {"PYTHONPATH": str(tmp_path)}
    norm = ["--normalization", "RMSNorm"]
    result = python(*RUN, *norm, "--spec", "my_spec", "layer", "--mhc", **path)
    assert result.returncode == 0, result.stdout[-3000:]
    assert BANNER in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mhc-num-streams", "0"], "ValueError: num_streams is 0; expected an int"),
        (["--mhc-sinkhorn-iterations", "0"], "ValueError: sinkhorn_iterations is 0"),
        (["--mhc-convention", "v4"], "argument --mhc-convention: invalid choice: 'v4'"),
        (["--mhc-backend", "triton"], "ValueError: backend is 'triton', but Triton needs a CUDA"),
        (
            ["--fp32-residual-connection", "--bf16"],
            "ValueError: mHC does not work with these settings: --fp32-residual-connection: the",
        ),
    ],
)
def test_bad_flags_stop_before_training(flags: list[str], message: str) -> None:
    result = python(*RUN, "--mhc", *flags)
    assert result.returncode != 0
    assert message in result.stdout
    assert not losses(result)


@pytest.mark.parametrize("asked", ["--mhc", "--spec megatron_mhc.spec gpt_layer_spec"])
def test_a_variable_that_nobody_reads_stops_before_training(asked: str) -> None:
    result = python(*RUN, *asked.split(), MHC_NUM_STREAMS="8")
    assert result.returncode != 0 and not losses(result)
    assert "ValueError: MHC_NUM_STREAMS set in the environment" in result.stdout


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
    (tmp_path / "examples_gpt.py").write_text((ROOT / SCRIPT).read_text())
    (tmp_path / "dense.py").write_text(DENSE)
    command = ["-m", "megatron_mhc.run", "--cpu", str(tmp_path / "dense.py"), *TINY, "--mhc"]
    result = python(*command)
    assert result.returncode != 0 and not losses(result)
    assert "DenseModelError: mHC was asked for, but these layers have none: " in result.stdout
    assert "module.decoder.layers.0, module.decoder.layers.1" in result.stdout


def test_a_script_that_is_not_megatrons(tmp_path: Path) -> None:
    script = tmp_path / "other.py"
    script.write_text("print('hello')\n")
    result = python("-m", "megatron_mhc.run", "--cpu", str(script), "--mhc")
    assert result.returncode != 0 and "hello" in result.stdout
    assert "ended without asking Megatron for its arguments" in result.stdout


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)"])
def test_a_script_that_builds_its_own_model(end: str, tmp_path: Path) -> None:
    """It asks Megatron for its arguments, --mhc among them, and for nothing else."""
    script = tmp_path / "own.py"
    script.write_text(
        "from megatron.training.arguments import parse_args, validate_args\n"
        "validate_args(parse_args())\n"
        f"print('trained')\n{end}\n"
    )
    result = python("-m", "megatron_mhc.run", "--cpu", str(script), *TINY, "--mhc")
    assert result.returncode != 0 and "trained" in result.stdout
    assert "own.py got --mhc and ended without a layer with mHC" in result.stdout


def test_the_runner_without_a_gpu_names_the_flag() -> None:
    result = python("-m", "megatron_mhc.run", SCRIPT, *TINY, "--mhc")
    assert result.returncode != 0
    assert result.stdout.strip() == (
        "megatron_mhc.run: there is no CUDA device here; add --cpu to train on the CPU"
    )


def test_the_runner_without_a_file() -> None:
    result = python("-m", "megatron_mhc.run", "--cpu", "nothing.py")
    assert result.returncode == 2 and "there is no file 'nothing.py'" in result.stdout


@pytest.mark.parametrize("flags", [["--help"], ["--cpu", "-h"]])
def test_the_runners_help_lists_our_flags(flags: list[str]) -> None:
    result = python("-m", "megatron_mhc.run", *flags)
    assert result.returncode == 0
    for flag in ("--cpu", "--mhc ", "--mhc-num-streams", "--mhc-variant"):
        assert flag in result.stdout


def test_every_patch_of_the_plugin_undoes_cleanly() -> None:
    from megatron_mhc.patches import registry
    from megatron_mhc.patches.registry import locate
    from megatron_mhc.start.activate import plugin_patches

    registry.undo()  # what with_mhc applied in the tests above
    patches = plugin_patches()
    held = [vars(owner)[name] for owner, name in (locate(patch.target) for patch in patches)]
    registry.apply(*patches)
    try:
        changed = [vars(owner)[name] for owner, name in (locate(p.target) for p in patches)]
        assert all(new is not old for new, old in zip(changed, held, strict=True))
    finally:
        registry.undo()
    back = [vars(owner)[name] for owner, name in (locate(patch.target) for patch in patches)]
    assert all(new is old for new, old in zip(back, held, strict=True))


def test_muon_never_sees_mhc() -> None:
    """Megatron's own rule takes every matrix; ours sends marked ones to the other optimizer."""
    import torch
    import torch.distributed as dist
    from megatron.core import optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    from megatron_mhc.model.connection import HyperConnection
    from megatron_mhc.model.parameters import MARK
    from megatron_mhc.patches import registry
    from megatron_mhc.patches.parameter_groups import parameter_group_patches

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), HyperConnection(MHCConfig(), 4, 0))
    phi, weight = model[1].phi, model[0].weight
    no_matrix = ParamPredicate(name="no_matrix", fn=lambda p: p.dim() != 2)
    overrides = {ParamKey(predicate=no_matrix): {"optimizer": "adam"}}
    config = optimizer.OptimizerConfig(optimizer="muon", lr=1e-3)
    layer_wise = optimizer.is_managed_by_layer_wise_optimizer
    assert layer_wise(phi) and layer_wise(weight)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    registry.apply(*parameter_group_patches(MARK))
    try:
        groups = optimizer._get_param_groups([model], config, overrides)
        (ours,) = [g for g in groups if any(p is phi for p in g["params"])]
        (theirs,) = [g for g in groups if any(p is weight for p in g["params"])]
        assert (ours["optimizer"], ours["wd_mult"]) == ("adam", 0.0)
        assert "optimizer" not in theirs and theirs["wd_mult"] == 1.0
        assert not optimizer.is_managed_by_layer_wise_optimizer(phi)
        assert optimizer.is_managed_by_layer_wise_optimizer(weight)
    finally:
        registry.undo()
        dist.destroy_process_group()
