"""The launch scripts: the MoE example trains, and what needs a cluster is checked without one."""

import contextlib
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.megatron.common.flags import numbered_losses
from tests.megatron.common.scripts import EXAMPLES, NEEDS_0_19, launch


@contextlib.contextmanager
def shown_to_a_reader(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`show` of the launch scripts, with their settings; what is written to it comes out or not."""
    settings = f"set -euo pipefail; NAME=x RUN={folder}; source {EXAMPLES}/launch.sh"
    with subprocess.Popen(
        ["bash", "-c", f"{settings}; show"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("made", "given", "taken"),
    [
        (True, {}, ".venv/bin/python"),
        (False, {}, "python"),
        (True, {"VIRTUAL_ENV": "/mine"}, "python"),
        (True, {"CONDA_PREFIX": "/mine"}, "python"),
        (True, {"PYTHON": "python3.12"}, "python3.12"),
    ],
    ids=["made", "none", "active", "conda", "asked for"],
)
def test_the_scripts_find_the_environment_that_make_train_made(
    made: bool, given: dict[str, str], taken: str, tmp_path: Path
) -> None:
    if made:
        python = tmp_path / ".venv/bin/python"
        python.parent.mkdir(parents=True)
        python.touch(0o755)
    others = ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX")
    environment = {k: v for k, v in os.environ.items() if k not in others} | given
    program = f'set -euo pipefail; NAME=x; source {EXAMPLES}/launch.sh; echo "$PYTHON"'
    command = ["bash", "-c", program]
    found = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout == f"{taken}\n"


def test_a_line_of_progress_is_shown_when_it_is_printed(tmp_path: Path) -> None:
    """And what nobody wants to see is in the log alone."""
    line = " iteration       10/      20 | lm loss: 1.0\n"
    with shown_to_a_reader(tmp_path) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"noise \0\n{line}")
        ready, _, _ = select.select([process.stdout], [], [], 20)  # the input stays open
        assert ready and process.stdout.readline() == line
        process.stdin.close()
        assert process.wait(20) == 0 and process.stdout.read() == ""
    assert (tmp_path / "train.log").read_text() == f"noise \0\n{line}"


def test_a_run_without_a_line_of_progress_is_no_error(tmp_path: Path) -> None:
    with shown_to_a_reader(tmp_path) as process:
        assert process.communicate("noise\n", timeout=20)[0] == "" and process.returncode == 0


@pytest.mark.parametrize("example", ["moe", "hybrid"])
def test_a_tiny_mixture_of_experts_trains_and_resumes(example: str, tmp_path: Path) -> None:
    """Latent attention, a dense layer first, shared and routed experts, their balancing loss."""
    run = {"RUNS": str(tmp_path), "ITERATIONS": "8"}
    small = ["--seq-length", "64", "--max-position-embeddings", "64", "--eval-iters", "1"]
    first = launch(f"{example}/tiny.sh", *small, "--exit-interval", "4", **run)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-2000:]
    second = launch(f"{example}/tiny.sh", *small, **run)
    assert second.returncode == 0, second.stdout[-4000:] + second.stderr[-2000:]
    logged = [numbered_losses(run.stdout) for run in (first, second)]
    assert [[step for step, _ in lines] for lines in logged] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    start, last = float(logged[0][0][1]), float(logged[1][-1][1])
    assert last < start - 0.5
    for output in (first.stdout, second.stdout):
        assert output.count("mHC is on: 4 streams") == 1
        # the auxiliary loss of perfectly balanced experts is 1
        balance = re.findall(r"load_balancing_loss: (\S+)", output)
        assert balance and all(0.9 < float(value) < 2.0 for value in balance)


def test_a_pattern_gives_the_hybrid_script_the_gpt_scripts_layers(tmp_path: Path) -> None:
    """Without experts' flags, which main stops over there; the same losses, digit for digit."""
    run = {"RUNS": str(tmp_path), "ITERATIONS": "2"}
    small = ["--seq-length", "64", "--max-position-embeddings", "64", "--eval-iters", "1"]
    patterned = ["--hybrid-layer-pattern", "*-*-*-*-"]
    hybrid = launch("hybrid/tiny.sh", *small, *patterned, **run)
    assert hybrid.returncode == 0, hybrid.stdout[-4000:] + hybrid.stderr[-2000:]
    gpt = numbered_losses(launch("gpt/tiny.sh", *small, **run).stdout)
    assert numbered_losses(hybrid.stdout) == gpt and len(gpt) == 2


CLUSTERS = {
    # LLaMA-3-8B's own count, with what mHC adds to 64 sites of 4 * 4096 channels
    "gpt": (64, 8_030_261_248 + 64 * (24 * 4 * 4096 + 3 + 24)),
    # the sizes of the paper's table: MLA, a dense layer, 29 of experts, both embeddings, mHC
    "moe": (
        128,
        30 * (2560 * 32 * 192 + 2560 * (512 + 64) + 512 * 32 * 256 + 32 * 128 * 2560 + 2 * 2560)
        + 3 * 2560 * 12288
        + 29 * (72 * 2560 + (72 + 2) * 3 * 2560 * 1536)
        # Transformer Engine's norms in the projections of the queries and of the latent
        + 30 * (2560 + 512)
        + 2 * 129280 * 2560
        + 2560
        + 60 * (24 * 4 * 2560 + 3 + 24),
    ),
}


@NEEDS_0_19
@pytest.mark.parametrize("kind", CLUSTERS)
def test_the_cluster_scripts_flags_build_the_model_that_they_name(kind: str) -> None:
    gpus, parameters = CLUSTERS[kind]
    done = launch(f"{kind}/cluster.sh", CHECK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{gpus} GPUs: " in done.stdout
    said = done.stdout + done.stderr
    assert "UserWarning" not in said, "Megatron changes one of these flags"
    # the parser takes the default too, which stops at the first save for want of a package
    assert "--async-strategy mcore" in (EXAMPLES / kind / "cluster.sh").read_text()
    assert f"the whole model: {parameters:,} parameters" in done.stdout
    stages = re.findall(r"^stage (\d), a GPU: ([\d,]+) parameters .* ([\d.]+) GiB of weights, "
                        r"gradients.* ([\d.]+) GiB \(recompute", done.stdout, re.M)  # fmt: skip
    assert [stage for stage, *_ in stages] == ["0", "1", "2", "3"]
    # an H100's 80 GB leave room for activations
    assert all(float(states) + float(ours) < 20 for _, _, states, ours in stages)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("script", ["gpt/single_gpu.sh", "moe/single_gpu.sh", "moe/cluster.sh"])
def test_without_a_gpu_its_scripts_name_those_for_a_cpu(script: str) -> None:
    done = launch(script)
    assert done.returncode == 2 and "sees: examples/gpt/tiny.sh" in done.stderr


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="it is there")
@pytest.mark.parametrize("script", ["gpt/single_gpu.sh", "moe/single_gpu.sh", "moe/cluster.sh"])
def test_without_transformer_engine_a_gpu_script_says_what_to_install(
    script: str, tmp_path: Path
) -> None:
    """With a torch that has a GPU, in front of the one that is installed."""
    pretended = "class cuda:\n    is_available = staticmethod(lambda: True)\n"
    (tmp_path / "torch.py").write_text(pretended)
    done = launch(script, PYTHON=sys.executable, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "-m pip install --no-build-isolation -e '.[te]'" in done.stderr


@NEEDS_0_19
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("gpt/single_gpu.sh", []),
        ("moe/single_gpu.sh", ["--fp8-format", "hybrid", "--moe-router-padding-for-quantization"]),
    ],
)
def test_the_single_gpu_scripts_flags_are_accepted(script: str, flags: list[str]) -> None:
    done = launch(script, *flags, CHECK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^stage 0, a GPU: [\d,]+ parameters \(1,", done.stdout, re.M)


@NEEDS_0_19
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num-experts", "73"], "Number of experts should be a multiple of expert model"),
        (["--fp32-residual-connection"], "the streams are kept in the model's dtype"),
    ],
)
def test_flags_that_are_refused_are_named(flags: list[str], says: str) -> None:
    done = launch("moe/cluster.sh", *flags, CHECK="1")
    assert done.returncode == 2 and says in done.stderr
    assert "Traceback" not in done.stderr


SCRIPTS = [
    *(f"continue/{model}.sh" for model in ("deepseek_v4", "deepseek_v4_1")),
    *(f"gpt/{size}.sh" for size in ("cluster", "single_gpu", "tiny")),
    "hybrid/tiny.sh",
    *(f"moe/{size}.sh" for size in ("cluster", "single_gpu", "tiny")),
]


def test_every_script_is_executable() -> None:
    assert [str(path.relative_to(EXAMPLES)) for path in sorted(EXAMPLES.glob("*/*.sh"))] == SCRIPTS
    assert all(os.access(EXAMPLES / script, os.X_OK) for script in SCRIPTS)


@NEEDS_0_19
@pytest.mark.parametrize("kind", ["gpt", "hybrid", "moe"])
def test_the_tiny_scripts_flags_are_accepted(kind: str) -> None:
    """As those of the others are above: all of them know where they are (`launch`)."""
    done = launch(f"{kind}/tiny.sh", CHECK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^stage 0, a GPU: [\d,]+ parameters", done.stdout, re.M)
