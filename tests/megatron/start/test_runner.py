"""The runner, `python -m megatron_mhc.run`: what it trains, what it says and what it refuses."""

import json
import re
from pathlib import Path

import pytest

from tests.megatron.common.flags import BANNER, RUN, SCRIPT, SOURCE, TINY, losses
from tests.megatron.common.launch import ROOT, RUNNER, cold_python, forked_python, forked_run


@pytest.fixture(scope="module")
def wide() -> str:
    """What the runner prints with --mhc, as a user starts it."""
    result = cold_python(*RUN, "--mhc")
    assert result.returncode == 0, result.stdout[-3000:]
    return result.stdout


def test_the_runner_trains_with_one_banner_line(wide: str) -> None:
    ordinary = forked_python(*RUN, stage="torch")
    assert wide.count("mHC is on") == 1 and BANNER in wide
    assert ordinary.returncode == 0 and "mHC is on" not in ordinary.stdout
    assert len(losses(wide)) == len(losses(ordinary.stdout)) == 3
    assert losses(wide)[0] == losses(ordinary.stdout)[0], "step 0 is the ordinary network's"
    assert losses(wide)[2] != losses(ordinary.stdout)[2]


def test_a_fork_of_the_tests_trains_as_what_a_user_starts(wide: str) -> None:
    """Most tests take one: it saves the start and the imports. This one imports Megatron."""
    result = forked_python(*RUN, "--mhc", stage="torch")
    assert BANNER in result.stdout and losses(result.stdout) == losses(wide)


def test_the_guides_command_without_a_gpu_trains() -> None:
    """With our script of the same flags, as Megatron's `pretrain_gpt.py` is in no wheel."""
    guide = (ROOT / "docs/guide/turn-on.md").read_text().replace("\\\n", "")
    command = re.search(r"^ +python (-m megatron_mhc.run --cpu) pretrain_gpt.py (.*)$", guide, re.M)
    assert command is not None
    result = forked_python(*command[1].split(), SCRIPT, *command[2].split(), stage="torch")
    assert result.returncode == 0, result.stdout[-3000:]
    assert "> mHC is on: 4 streams" in result.stdout and len(losses(result.stdout)) == 3


@pytest.mark.parametrize("layout", ["E|ttL", "Ett|L"])
def test_a_stage_without_layers_trains_and_ends_well(layout: str) -> None:
    """The first rank prints the banner and the last one the metrics, with sites or without."""
    flags = ["--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", layout]
    status, printed = forked_run(2, SCRIPT, *TINY, *flags, "--mhc", "--mhc-log-interval", "1")
    assert status == 0, printed[-3000:]
    assert printed.count("mHC is on") == 1 and BANNER in printed
    assert len(set(losses(printed))) == 3, "it does not train"
    assert re.findall("> mHC at step (.): composite gain", printed) == ["1", "2", "3"]


def test_the_runner_says_how_it_recomputes() -> None:
    result, kept = (
        forked_python(*RUN, "--mhc", *more) for more in (["--mhc-recompute", "auto"], [])
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert (
        "12,396 extra parameters; recompute in blocks of 1 layer (auto) (what it saves is predicted"
        " for backend triton alone) (settings from flags)"
    ) in result.stdout
    assert losses(result.stdout) == losses(kept.stdout)


def test_the_runner_says_that_the_reference_gives_no_bf16_streams_back() -> None:
    result = forked_python(*RUN, "--bf16", "--mhc", "--mhc-recompute", "1")
    assert result.returncode == 0, result.stdout[-3000:]
    assert "blocks of 1 layer gives no streams back: backend torch keeps fp32" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mhc-num-streams", "0"], "megatron_mhc.run: num_streams is 0; expected an int"),
        (["--mhc-sinkhorn-iterations", "0"], "megatron_mhc.run: sinkhorn_iterations is 0"),
        (["--mhc-convention", "v4"], "argument --mhc-convention: invalid choice: 'v4'"),
        (
            ["--mhc-backend", "triton"],
            "megatron_mhc.run: backend is 'triton', but Triton needs a CUDA",
        ),
        (
            ["--fp32-residual-connection", "--bf16"],
            "run: mHC does not work with these settings: --fp32-residual-connection: the",
        ),
    ],
)
def test_bad_flags_stop_before_training(flags: list[str], message: str) -> None:
    result = forked_python(*RUN, "--mhc", *flags)
    assert result.returncode != 0
    assert message in result.stdout
    assert not losses(result.stdout)
    assert "Traceback" not in result.stdout


HETEROGENEOUS = [
    *("--swiglu", "--normalization", "RMSNorm", "--untie-embeddings-and-output-weights"),
    *("--disable-bias-linear", "--position-embedding-type", "rope", "--use-rope-scaling"),
    *("--use-rotary-position-embeddings", "--group-query-attention", "--num-query-groups", "1"),
]


def test_layers_of_different_kinds_are_refused_at_start(tmp_path: Path) -> None:
    """A layer without an MLP, as pruned models have."""
    layer = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": None, "no_op": True}}
    model = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    model |= {"hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False}
    model |= {"mlp_bias": False, "tie_word_embeddings": False, "rope_theta": 10000}
    model |= {"max_position_embeddings": 16, "rope_scaling": {"factor": 8.0}}
    model |= {"vocab_size": 127, "intermediate_size": 64, "initializer_range": 0.02}
    layers = tmp_path / "layers.json"
    layers.write_text(
        json.dumps(model | {"num_key_value_heads": None, "block_configs": [layer] * 2})
    )
    flag = ["--heterogeneous-layers-config-path", str(layers)]
    result = forked_python(*RUN, "--mhc", *flag, *HETEROGENEOUS)
    assert result.returncode != 0 and "Traceback" not in result.stdout, result.stdout[-3000:]
    assert f"{flag[0]}: layers of different kinds are not tried yet" in result.stdout


def test_a_patch_that_is_none_is_named_in_a_sentence() -> None:
    result = forked_python(*RUN, "--mhc", MEGATRON_MHC_PATCHES="-foo")
    assert result.returncode != 0 and "Traceback" not in result.stdout
    assert "megatron_mhc.run: MEGATRON_MHC_PATCHES turns off foo" in result.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mhc", SCRIPT], "--mhc stands in front of SCRIPT: it belongs behind it"),
        ([SCRIPT, "--cpu", *TINY, "--mhc"], f"move --cpu in front of {SCRIPT} to train on the"),
        ([SCRIPT, *TINY, "--mhc"], f"add --cpu in front of {SCRIPT} to train on the CPU"),
    ],
)
def test_the_runners_own_flags_stand_in_front_of_the_script(words: list[str], says: str) -> None:
    result = forked_python("-m", "megatron_mhc.run", *words, CUDA_VISIBLE_DEVICES="")
    assert result.returncode != 0 and says in result.stdout, result.stdout[-2000:]


ENDS_EARLY = """
import sys
import megatron.training.training as training
from examples_gpt import main

def stop(*args, **kwargs):  # as Megatron does on a signal, before it has a model
    exec(compile("import sys; sys.exit(0)", "exit", "exec"), {"__name__": training.__name__})
training.setup_model_and_optimizer = stop
main()
"""


def test_megatron_may_stop_before_there_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "examples_gpt.py").write_text(SOURCE)
    (tmp_path / "early.py").write_text(ENDS_EARLY)
    result = forked_python(*RUNNER, str(tmp_path / "early.py"), *TINY, "--mhc")
    assert result.returncode == 0 and not losses(result.stdout), result.stdout[-3000:]


def test_a_script_that_is_not_megatrons(tmp_path: Path) -> None:
    script = tmp_path / "other.py"
    script.write_text("print('hello')\n")
    result = forked_python(*RUNNER, str(script), "--mhc")
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
    result = forked_python(*RUNNER, str(script), *TINY, "--mhc")
    assert result.returncode != 0 and "trained" in result.stdout
    assert "own.py got --mhc and ended without a layer with mHC" in result.stdout


def test_the_runner_without_a_file() -> None:
    result = forked_python(*RUNNER, "nothing.py")
    assert result.returncode == 2 and "there is no file 'nothing.py'" in result.stdout


@pytest.mark.parametrize("flags", [["--help"], ["--cpu", "-h"]])
def test_the_runners_help_lists_our_flags(flags: list[str]) -> None:
    result = forked_python("-m", "megatron_mhc.run", *flags)
    assert result.returncode == 0
    for flag in ("--cpu", "--mhc ", "--mhc-num-streams", "--mhc-variant"):
        assert flag in result.stdout
