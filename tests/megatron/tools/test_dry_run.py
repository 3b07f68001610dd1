"""`doctor --args`, the dry run: a model's parameters, FLOPs and memory from a script's flags."""

import re

import pytest

from megatron_mhc.costs.kernel_passes import LEAST
from megatron_mhc.costs.recompute_plan import Plan
from megatron_mhc.costs.step_costs import HOST, HOST_OF_MHC, LATENCY
from megatron_mhc.patches.supported_versions import is_installed
from tests.megatron.common.flags import HYBRID_SPEC, ROPE, SPEC, TINY
from tests.megatron.common.launch import forked_python
from tests.megatron.common.scripts import NEEDS_0_19, launch

DRY_RUN = ("-m", "megatron_mhc", "doctor", "--args")
PLAIN = [
    *("--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4"),
    *("--seq-length", "32", "--max-position-embeddings", "32", "--micro-batch-size", "1"),
    *("--global-batch-size", "2", "--train-iters", "2", "--lr", "1e-3", "--bf16"),
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "127"),
]
WITHOUT_LENGTH = [*PLAIN[:6], *PLAIN[8:]]


MTP = ["--mtp-num-layers", "1"]
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
    stages = done.stdout.count("\nstage ")
    assert f"doctor: building: 0 of {stages} stages [" in done.stderr
    assert f"doctor: building: {stages} of {stages} stages [" in done.stderr
    assert "doctor: building" not in done.stdout
    wanted = f"{sum(bytes_a_token.values()):,.0f}"
    assert re.search(rf"^stage 1.*activations {wanted} bytes a token", done.stdout, re.M)


def page_of(*flags: str) -> str:
    """What the dry run prints of `PLAIN`'s model, with mHC."""
    done = forked_python(*DRY_RUN, *PLAIN, *ROPE, *flags, "--mhc")
    assert done.returncode == 0, done.stdout
    return done.stdout


LOCAL = ["--transformer-impl", "local", "--no-persist-layer-norm", "--no-masked-softmax-fusion"]


@NEEDS_0_19
def test_a_steps_time_is_reckoned_from_the_flags() -> None:
    """Two stages of two layers, eight microbatches: what `estimate` says of the same sizes."""
    stages = ["--pipeline-model-parallel-size", "2", "--untie-embeddings-and-output-weights"]
    given = ["doctor", "--card", "A100", "--link", "1", "--args"]
    flags = [*PLAIN, *ROPE, *stages, "--global-batch-size", "8", "--micro-batch-size", "1"]
    page = forked_python("-m", "megatron_mhc", *given, *flags, "--mhc", WORLD_SIZE="2").stdout
    least = sum(LEAST) * 1e3  # so few tokens
    assert f"({least:.2f} ms a site and microbatch, both ways)" in page, page
    found = re.search(r"ordinary (\S+) ms[\s\S]*with mHC (\S+) ms .*host (\S+),.*at 1 GB/s", page)
    assert found, page
    ordinary, mhc = (float(found[i].replace(",", "")) for i in (1, 2))
    # bound by the host: four sublayers a stage, eight microbatches and one more of the bubble
    assert ordinary == pytest.approx(4 * 9 * sum(HOST) * 1e3, abs=1 + 8 * 4 * LATENCY * 1e3)
    assert mhc - ordinary == pytest.approx(4 * 9 * sum(HOST_OF_MHC) * 1e3, abs=3)
    assert "with --mhc-overlap-in-flight 2" in page


WIDE = [
    *("--num-layers", "1", "--hidden-size", "4096", "--num-attention-heads", "32"),
    *("--seq-length", "4096", "--max-position-embeddings", "4096", "--micro-batch-size", "2"),
]
"""The size whose sites were timed; the last of equal flags counts."""


@NEEDS_0_19
@pytest.mark.parametrize(
    ("flags", "milliseconds"),
    [
        ("", "1.06"),
        ("--mhc-num-streams 8", "6.24"),
        ("--mhc-convention deepseek_v4_1", "0.88"),
    ],
)
def test_a_sites_kernels_are_those_of_the_flags(flags: str, milliseconds: str) -> None:
    page = page_of(*WIDE, *flags.split())
    assert f"({milliseconds} ms a site and microbatch, both ways)" in page, page


@NEEDS_0_19
def test_what_a_pipelines_step_takes_longer_than_its_rate_says_is_its_messages() -> None:
    """Eight microbatches and the one of the bubble take 90 ms at the host's pace, and the step 200:
    each of the nine waits for a message."""
    stages = ["--pipeline-model-parallel-size", "2", "--untie-embeddings-and-output-weights"]
    flags = [*PLAIN, *ROPE, *stages, "--global-batch-size", "8", "--micro-batch-size", "1"]
    given = ["doctor", "--mfu", "0.4", "--step-ms", "200", "--args"]
    page = forked_python("-m", "megatron_mhc", *given, *flags, "--mhc", WORLD_SIZE="2").stdout
    assert "ordinary 200 ms, as you measured it (--step-ms): every stage at 40.0%" in page, page
    found = re.search(r"([\d.]+) ms for ([\d.]+) at 50 GB/s", page)
    stop = (200 - 4 * 9 * sum(HOST) * 1e3) / 9
    assert found and [float(one) for one in found.groups()] == pytest.approx([stop] * 2, abs=0.01)
    alone = forked_python(
        "-m",
        "megatron_mhc",
        "doctor",
        "--step-ms",
        "200",
        "--args",
        *flags,
        "--mhc",
        WORLD_SIZE="2",
    ).stdout
    assert "0.02 ms for 0.02 at 50 GB/s" in alone, alone


@NEEDS_0_19
def test_a_measured_step_that_cannot_be_is_refused() -> None:
    given = ["doctor", "--step-ms", "0.01", "--args"]
    done = forked_python("-m", "megatron_mhc", *given, *PLAIN, *ROPE, "--mhc")
    assert done.returncode == 2
    assert "is faster than the model allows" in done.stdout


@NEEDS_0_19
@pytest.mark.parametrize("recompute", [[], ["--mhc-recompute", "2"]], ids=str)
def test_a_hybrid_models_layers_are_counted_one_by_one(recompute: list[str]) -> None:
    """Pairs of them are a GPT's layers: the same sites, parameters and bytes in another split."""
    gpt = page_of(*LOCAL, *recompute)
    blocks = ["--mhc-recompute", "4"] if recompute else []
    pairs = [*HYBRID_SPEC, "--hybrid-layer-pattern", "*-*-*-*-"]
    hybrid = page_of(*LOCAL, *pairs, *blocks)
    wanted = r"mHC: (8 sites, .*)\n +(FLOPs a token: \S+) [\s\S]*activations (\S+) bytes a token"
    of_gpt, of_hybrid = re.search(wanted, gpt), re.search(wanted, hybrid)
    assert of_gpt and of_hybrid, hybrid
    assert of_hybrid.groups() == of_gpt.groups()
    whole = re.search(r"the whole model: .*", gpt)
    assert whole and whole[0] in hybrid


@NEEDS_0_19
def test_a_hybrid_models_stages_are_its_segments() -> None:
    """Transformer Engine's norms: an own one in front of experts alone, of three layers."""
    pattern = ["--hybrid-layer-pattern", "*-|*-E", "--num-experts", "2"]
    stages = ["--pipeline-model-parallel-size", "2", "--untie-embeddings-and-output-weights"]
    printed = forked_python(
        *DRY_RUN,
        *PLAIN,
        *ROPE,
        *HYBRID_SPEC,
        *pattern,
        *stages,
        "--mhc",
        "--mhc-recompute",
        "2",
        WORLD_SIZE="2",
    ).stdout
    for stage, (layers, in_flight, norms) in enumerate(((2, 2, 0), (3, 1, 1 / 3))):
        plan = Plan(4, 64, (layers,), in_flight, norms, 2, sites=1)
        wanted = f"{sum(plan.bytes_a_token.values()):,.0f}"
        found = rf"^stage {stage}.*activations {wanted} bytes a token"
        assert re.search(found, printed, re.M), (wanted, printed)


@NEEDS_0_19
def test_a_hybrid_models_layers_without_their_package_are_named() -> None:
    mamba = [*HYBRID_SPEC, "--hybrid-layer-pattern", "M*-"]
    done = forked_python(*DRY_RUN, *PLAIN, *ROPE, *mamba, "--mhc")
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert "stage 0 cannot be built: MambaSSM is not installed" in done.stdout


@NEEDS_0_19
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        # Megatron's defaults that want CUDA kernels, and a norm that Transformer Engine alone has
        ([*PLAIN, "--transformer-impl", "transformer_engine", "--apply-layernorm-1p"], ""),
        (["--num-layers", "2"], "refused: --micro-batch-size is missing: add it"),
        (WITHOUT_LENGTH, "refused: --seq-length is missing: add it"),
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
    done = forked_python(*DRY_RUN, *flags, "--mhc")
    assert done.returncode == (2 if says else 0), done.stdout
    assert "Traceback" not in done.stdout
    assert (says or "the whole model: 259,672 parameters") in done.stdout


@NEEDS_0_19
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mhc", "--card", "H200"], "arguments: --card H200; --card belongs in front of --args"),
        (["pretrain.py", "--mhc"], "behind --args stand a run's flags alone, without the script"),
        (["--mhc", "--num-layer", "2"], "arguments: --num-layer 2; near are --num-layers"),
        (["--mhc", "--mhc-num-stream", "2"], "; near are --mhc-num-streams"),
        (["--help"], "doctor --help lists those in front of it"),
    ],
)
def test_words_that_are_no_flags_are_told_in_a_sentence(words: list[str], says: str) -> None:
    done = forked_python(*DRY_RUN, *words, *PLAIN)
    assert done.returncode == 2 and says in done.stdout, done.stdout
    assert len(done.stdout.splitlines()) <= 3, "no pages of usage"


@NEEDS_0_19
def test_a_dry_run_of_megatrons_own_spec_flag_reads_the_environment() -> None:
    flags = [*TINY, *SPEC]
    done = forked_python(*DRY_RUN, *flags, MHC_NUM_STREAMS="2", MHC_CONVENTION="deepseek_v4")
    given = ["--mhc-num-streams", "2", "--mhc-convention", "deepseek_v4"]
    assert done.returncode == 0, done.stdout
    pages = (done.stdout, forked_python(*DRY_RUN, *flags, *given).stdout)
    read, told = (page[page.index("1 GPU: ") :] for page in pages)
    assert read == told and "mHC: 4 sites" in read
    done = forked_python(*DRY_RUN, *flags, MHC_NUM_STREAMS="two")
    assert done.returncode == 2 and "refused: MHC_NUM_STREAMS is 'two'" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mfu", "40", "--args"], "argument --mfu: 40; expected a share, at most 1"),
        (["--link", "0", "--args"], "argument --link: 0; expected a number above 0"),
        (["--num-layers", "2"], "--num-layers 2; a training run's flags stand behind --args"),
    ],
)
def test_the_doctors_own_flags_are_checked(words: list[str], says: str) -> None:
    done = forked_python("-m", "megatron_mhc", "doctor", *words)
    assert done.returncode == 2 and says in done.stdout, done.stdout


@NEEDS_0_19
@pytest.mark.parametrize(
    ("placed", "says"),
    [
        (["Et|tt|tm|L", *MTP], "stands on a pipeline stage without the loss"),
        (["E|tt|tt|mL", *MTP, "--untie-embeddings-and-output-weights", "--mhc-overlap-p2p"], None),
        (["E|tt|tt|mL", *MTP], "stage 3 cannot be built: .* and not save it: .* wants --untie"),
    ],
    ids=str,
)
def test_the_dry_run_knows_what_a_stage_without_layers_does_not_go_with(
    placed: list[str], says: str | None
) -> None:
    flags = ["--pipeline-model-parallel-size", "4", "--pipeline-model-parallel-layout", *placed]
    done = forked_python(*DRY_RUN, *PLAIN, *ROPE, *flags, "--mhc", WORLD_SIZE="4")
    assert done.returncode == (2 if says else 0), done.stdout
    assert "Traceback" not in done.stdout
    assert re.search(says or "the whole model: ", done.stdout), done.stdout


@NEEDS_0_19
@pytest.mark.parametrize(
    "flags", ["--mhc-backend torch", "--mhc-variant hc", "--mhc-num-streams 3", ""]
)
def test_the_dry_run_says_whose_activations_it_reckons(flags: str) -> None:
    result = forked_python(*DRY_RUN, *TINY, "--mhc", *flags.split())
    assert result.returncode == 0, result.stdout
    assert ("no estimate of a step's time" in result.stdout) == bool(flags)


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
    done = forked_python("-c", COUNT, *TINY, stage="megatron")
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


@pytest.mark.skipif(not is_installed("<0.19"), reason="Megatron 0.19 has what doctor --args builds")
def test_megatron_0_18_is_refused_by_the_dry_run() -> None:
    result = forked_python(*DRY_RUN, *TINY, "--mhc")
    assert result.returncode == 2 and "install 0.19" in result.stdout
