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

from megatron_mhc.costs.recompute_plan import Plan
from megatron_mhc.patches.releases import is_installed
from tests.megatron.common.launch import ROOT
from tests.megatron.examples.test_gpt import environment, losses
from tests.megatron.start.test_plugin import TINY, python

NEEDS_0_19 = pytest.mark.skipif(
    is_installed("<0.19"), reason="doctor --args is refused with Megatron 0.18"
)

EXAMPLES = ROOT / "examples"


ROPE = ["--position-embedding-type", "rope"]
PLAIN = [
    *("--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4"),
    *("--seq-length", "32", "--max-position-embeddings", "32", "--micro-batch-size", "1"),
    *("--global-batch-size", "2", "--train-iters", "2", "--lr", "1e-3", "--bf16"),
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "127"),
]


def launch(script: str, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a launch script, from a folder that is not the repository's; its two outputs apart."""
    return subprocess.run(
        [EXAMPLES / script, *flags],
        cwd="/",
        env=environment(PYTHON=sys.executable, **settings),
        capture_output=True,
        text=True,
        timeout=300,
    )


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


def test_the_tiny_mixture_of_experts_trains_and_resumes(tmp_path: Path) -> None:
    """Latent attention, a dense layer first, shared and routed experts, their balancing loss."""
    run = {"RUNS": str(tmp_path), "ITERATIONS": "8"}
    small = ["--seq-length", "64", "--max-position-embeddings", "64", "--eval-iters", "1"]
    first = launch("moe/tiny.sh", *small, "--exit-interval", "4", **run)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-2000:]
    second = launch("moe/tiny.sh", *small, **run)
    assert second.returncode == 0, second.stdout[-4000:] + second.stderr[-2000:]
    assert [step for step, _ in losses(first.stdout)] == [1, 2, 3, 4]
    assert [step for step, _ in losses(second.stdout)] == [5, 6, 7, 8]
    start, last = float(losses(first.stdout)[0][1]), float(losses(second.stdout)[-1][1])
    assert last < start - 0.5
    for output in (first.stdout, second.stdout):
        assert output.count("mHC is on: 4 streams") == 1
        # the auxiliary loss of perfectly balanced experts is 1
        balance = re.findall(r"load_balancing_loss: (\S+)", output)
        assert balance and all(0.9 < float(value) < 2.0 for value in balance)


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


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="it is there")
@pytest.mark.parametrize("script", ["gpt/single_gpu.sh", "moe/single_gpu.sh", "moe/cluster.sh"])
def test_without_transformer_engine_a_gpu_script_says_what_to_install(script: str) -> None:
    done = launch(script)
    assert done.returncode == 2 and "-m pip install '.[te]'" in done.stderr


FULL = ["--mhc-recompute", "off", "--recompute-granularity", "full"]


@NEEDS_0_19
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--mhc-overlap-p2p", "--mhc-overlap-in-flight", "2", "--mhc-recompute", "off"],
            (7, 5, 3, 1),
        ),
        # a step of two microbatches
        (["--mhc-recompute", "off", "--global-batch-size", "64"], (2, 2, 2, 1)),
    ],
)
def test_the_dry_run_knows_how_many_microbatches_a_stage_holds(
    flags: list[str], says: tuple[int, ...]
) -> None:
    done = launch("moe/cluster.sh", *flags, CHECK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^stage .* \((\d) microbatch(?:es)? in flight\)", done.stdout, re.M)
    assert tuple(int(number) for number in found) == says


@NEEDS_0_19
@pytest.mark.parametrize(
    ("method", "length", "streams", "layers"),
    # stage 1: 8 layers, 3 microbatches in flight; 3 streams more a block, layers that keep all
    [("uniform", 8, 3 * 3 * 1, 8), ("block", 6, 3 * 3 * 6, 3 * 2 + 1)],
)
def test_the_dry_run_knows_what_full_recompute_keeps(
    method: str, length: int, streams: int, layers: int
) -> None:
    blocks = ["--recompute-method", method, "--recompute-num-layers", str(length)]
    done = launch("moe/cluster.sh", *FULL, *blocks, CHECK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    layer = 2 * (5 * 2560 * 2 + 4 * (4 + 16 + 24 + 1))
    wanted = streams * 2560 * 2 + layers * layer
    assert re.search(rf"^stage 1.*activations {wanted:,} bytes a token", done.stdout, re.M)


@NEEDS_0_19
@pytest.mark.parametrize(
    ("kind", "width", "layers", "norms"), [("gpt", 4096, 8, 0), ("moe", 2560, 8, 2)]
)
def test_the_dry_run_drops_the_norms_that_transformer_engine_keeps_apart(
    kind: str, width: int, layers: int, norms: int
) -> None:
    """A dense layer's are parts of its projections; those before MLA and MoE are not."""
    done = launch(f"{kind}/cluster.sh", CHECK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    bytes_a_token = Plan(4, width, (layers,), 3, norms, "auto").bytes_a_token
    wanted = f"{sum(bytes_a_token.values()):,.0f}"
    assert re.search(rf"^stage 1.*activations {wanted} bytes a token", done.stdout, re.M)


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
        # Megatron's defaults that want CUDA kernels, and a norm that Transformer Engine alone has
        ([*PLAIN, "--transformer-impl", "transformer_engine", "--apply-layernorm-1p"], ""),
        (["--num-layers", "2"], "refused: AssertionError at `assert args.micro_batch_size"),
        (
            [*PLAIN, "--num-experts", "4", "--moe-shared-expert-intermediate-size", "32"],
            "stage 0 cannot be built: bias is not supported in the shared experts",
        ),
        (
            [*PLAIN, *["--multi-latent-attention", "--rope-type", "rope"], *ROPE],
            "stage 0 cannot be built: apply_rope_fusion for MLA only works with YARN",
        ),
    ],
)
def test_a_dry_run_of_ones_own_flags_says_why_not(flags: list[str], says: str) -> None:
    done = python("-m", "megatron_mhc", "doctor", "--args", *flags, "--mhc")
    assert done.returncode == (2 if says else 0), done.stdout
    assert "Traceback" not in done.stdout
    assert (says or "the whole model: 259,672 parameters") in done.stdout


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


@NEEDS_0_19
@pytest.mark.parametrize("flags", ["--mhc-backend torch", "--mhc-variant hc", ""])
def test_the_dry_run_says_whose_activations_it_reckons(flags: str) -> None:
    result = python("-m", "megatron_mhc", "doctor", "--args", *TINY, "--mhc", *flags.split())
    assert result.returncode == 0, result.stdout
    assert ("the reference keeps more" in result.stdout) == bool(flags)


COUNT = """
import sys
from megatron_mhc.patches import cpu, registry
cpu.enter()
from megatron_mhc.start.activate import activate
activate()
from megatron_mhc.tools.dry_run import parse
from megatron.training import training
for extra in ([], ["--mhc"], ["--mhc", "--mhc-num-streams", "2"]):
    args = parse([*sys.argv[1:], *extra])
    counted = training.num_floating_point_operations(args, 6)
    packed = training.num_floating_point_operations(args, 6, 6 * 16**2, 40)
    registry.undo("throughput")
    plain = training.num_floating_point_operations(args, 6)
    plain_packed = training.num_floating_point_operations(args, 6, 6 * 16**2, 40)
    activate()
    print("counted", counted - plain, packed - plain_packed)
"""


def test_megatrons_throughput_counts_mhc() -> None:
    """6 samples of 16 tokens; then 40 real tokens, as packed sequences have them."""
    done = python("-c", COUNT, *TINY)
    assert done.returncode == 0, done.stdout[-3000:]
    counted = [
        tuple(float(value) for value in line.split()[1:])
        for line in done.stdout.splitlines()
        if line.startswith("counted")
    ]

    def by_hand(n: int, sites: int = 4, width: int = 32) -> int:
        forward = 2 * width * sites * (n + (n * n + 2 * n) * n + n + n * (n + 1))
        return 3 * forward

    wanted = [(0.0, 0.0)] + [(96.0 * by_hand(n), 40.0 * by_hand(n)) for n in (4, 2)]
    assert counted == wanted


SCRIPTS = [
    f"{kind}/{size}.sh" for kind in ("gpt", "moe") for size in ("cluster", "single_gpu", "tiny")
]


def test_every_script_is_executable() -> None:
    assert [str(path.relative_to(EXAMPLES)) for path in sorted(EXAMPLES.glob("*/*.sh"))] == SCRIPTS
    assert all(os.access(EXAMPLES / script, os.X_OK) for script in SCRIPTS)


@NEEDS_0_19
@pytest.mark.parametrize("kind", ["gpt", "moe"])
def test_the_tiny_scripts_flags_are_accepted(kind: str) -> None:
    """As those of the others are above: all six know where they are (`launch`)."""
    done = launch(f"{kind}/tiny.sh", CHECK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^stage 0, a GPU: [\d,]+ parameters", done.stdout, re.M)


@pytest.mark.skipif(not is_installed("<0.19"), reason="Megatron 0.19 has what doctor --args builds")
def test_megatron_0_18_is_refused_by_the_dry_run() -> None:
    result = python("-m", "megatron_mhc", "doctor", "--args", *TINY, "--mhc")
    assert result.returncode == 2 and "install 0.19" in result.stdout
