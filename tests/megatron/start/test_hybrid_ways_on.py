"""Turning mHC on in a HybridModel by flags, and what is refused by name."""

import re
from pathlib import Path

import pytest

from megatron_mhc.patches.supported_versions import is_installed
from tests.megatron.common.flags import (
    BANNER,
    HYBRID,
    HYBRID_SCRIPT,
    HYBRID_SPEC,
    ROPE,
    STAND_IN,
    TINY,
    losses,
)
from tests.megatron.common.launch import ROOT, forked_run

FLAGS = [*TINY, *ROPE, *HYBRID]
OURS = ["--spec", "megatron_mhc.spec", "hybrid_stack_spec"]


def train(*flags: str, script: str = HYBRID_SCRIPT, runner: bool = True) -> str:
    """What a run prints, which must end well."""
    status, printed = forked_run(1, script, *flags, runner=runner)
    assert status == 0, printed[-3000:]
    return printed


@pytest.fixture(scope="module")
def wide() -> str:
    """What the runner prints with --mhc."""
    return train(*FLAGS, "--mhc")


def test_a_flag_gives_every_layer_a_site(wide: str) -> None:
    """A pattern of four layers has the sites of a GPT's two."""
    assert BANNER in wide
    ordinary = train(*FLAGS)
    assert losses(ordinary)[0] == losses(wide)[0]
    assert losses(ordinary)[1:] != losses(wide)[1:] and len(losses(wide)) == 3


def bare_script(folder: Path) -> str:
    """The example's script, that knows nothing of our flags, on the CPU."""
    script = folder / "train.py"
    source = (ROOT / HYBRID_SCRIPT).read_text()
    script.write_text(f"{STAND_IN}import sys; sys.path.insert(0, 'examples')\n{source}")
    return str(script)


def test_spec_is_megatrons_own_way(wide: str, tmp_path: Path) -> None:
    flags = [*TINY, *ROPE, *OURS, "--hybrid-layer-pattern", "*-*-"]
    printed = train(*flags, script=bare_script(tmp_path), runner=False)
    assert "(settings from environment)" in printed and "; 4 sites, 12,396 extra" in printed
    assert losses(printed) == losses(wide)


def test_the_runner_takes_either_of_our_specs(wide: str) -> None:
    """With a layer pattern both mean the hybrid one; Megatron's own is what it goes around."""
    for name in ("hybrid_stack_spec", "gpt_layer_spec"):
        flags = ["--spec", "megatron_mhc.spec", name, "--hybrid-layer-pattern", "*-*-"]
        assert losses(train(*TINY, *ROPE, *flags)) == losses(wide)
    old = ["--hybrid-override-pattern", "*-*-"]  # the pattern's name of old
    assert losses(train(*TINY, *ROPE, *HYBRID_SPEC, *old, "--mhc")) == losses(wide)


REFUSED: dict[str, tuple[list[str], str]] = {
    "Mamba without its package": (
        [*HYBRID_SPEC, "--hybrid-layer-pattern", "M*-"],
        "ImportError: MambaSSM is not installed",
    ),
    "gated delta nets without theirs": (
        [*HYBRID_SPEC, "--hybrid-layer-pattern", "G*-"],
        "ImportError: FLA is not installed",
    ),
    "expert overlap": (
        [*HYBRID, "--overlap-moe-expert-parallel-comm"],
        "--hybrid-layer-pattern with --overlap-moe-expert-parallel-comm: Megatron has no schedule",
    ),
    "CUDA graphs": (
        [*HYBRID, "--cuda-graph-impl", "full_iteration", "--no-check-for-nan-in-loss-and-grad"],
        "--hybrid-layer-pattern with --cuda-graph-impl: CUDA graphs of a HybridModel with mHC",
    ),
}
if is_installed("<0.19"):
    del REFUSED["expert overlap"]  # Megatron's own check comes first
    del REFUSED["CUDA graphs"]  # refused there in any model


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_says_so_at_start(case: str) -> None:
    flags, message = REFUSED[case]
    status, printed = forked_run(1, HYBRID_SCRIPT, *TINY, *ROPE, *flags, "--mhc")
    assert status != 0 and not losses(printed)
    assert message in printed, printed[-3000:]


def test_a_script_that_builds_a_gpt_is_told() -> None:
    status, printed = forked_run(1, "examples/pretrain_gpt.py", *FLAGS, "--mhc")
    assert status != 0 and not losses(printed)
    assert "the script builds no HybridModel, and --hybrid-layer-pattern" in printed


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--mhc"], "gpt_layer_spec, .* the model is a HybridModel: give --hybrid-layer-pattern"),
        (
            [*HYBRID_SPEC, "--mhc"],
            "has none of Megatron's layers. .* --hybrid-layer-pattern names: give it",
        ),
        (OURS, "makes a HybridModel's layers, and no --hybrid-layer-pattern says which"),
    ],
    ids=["--mhc", "Megatron's spec", "ours"],
)
def test_a_hybrid_model_without_its_pattern_is_told(
    flags: list[str], says: str, tmp_path: Path
) -> None:
    """Megatron's script does not look, and builds a model of no layers; our example's looks."""
    script = Path(bare_script(tmp_path))
    source = script.read_text()
    look = "if args.hybrid_layer_pattern is None:"
    assert look in source
    script.write_text(source.replace(look, "if False:"))
    status, printed = forked_run(1, str(script), *TINY, *ROPE, *flags)
    assert status != 0 and not losses(printed)
    assert re.search(says, printed), printed[-3000:]


def test_the_gpts_spec_for_a_hybrid_model_is_told(tmp_path: Path) -> None:
    flags = ["--spec", "megatron_mhc.spec", "gpt_layer_spec", "--hybrid-layer-pattern", "*-"]
    status, printed = forked_run(1, bare_script(tmp_path), *TINY, *ROPE, *flags, runner=False)
    assert status != 0 and not losses(printed)
    assert re.search(r"gpt_layer_spec, which returns no HybridStack's spec", printed)
