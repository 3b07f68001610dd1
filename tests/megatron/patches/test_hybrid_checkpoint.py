"""A HybridModel that stops, saves and resumes has the losses of one that does not, to the digit."""

from pathlib import Path

import pytest

from megatron_mhc.patches.supported_versions import is_installed
from tests.megatron.common.flags import (
    DISTRIBUTED,
    HYBRID_SCRIPT,
    HYBRID_SPEC,
    MOE,
    RESUMED,
    ROPE,
    losses,
)
from tests.megatron.common.launch import forked_run

STAGES = ["--pipeline-model-parallel-size", "2"]
CASES: dict[str, tuple[int, str, list[str]]] = {
    "bf16": (1, "*-*-", []),
    "learned head, streams recomputed": (
        1,
        "-*-",
        ["--mhc-convention", "deepseek_v4", "--mhc-recompute", "2"],
    ),
    "tensor and sequence parallel": (
        2,
        "*-*-",
        ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    ),
    "virtual segments, distributed optimizer": (2, "*-|*|-|*-", [*STAGES, *DISTRIBUTED]),
    "experts in two stages": (
        4,
        "*E|-*E",  # experts in both: Megatron stops over a stage without, the ordinary model too
        [*STAGES, "--expert-model-parallel-size", "2", *MOE, "--disable-bias-linear"],
    ),
    "multi-token prediction": (1, "*-*-/*-", []),
}
if is_installed("<0.19"):
    del CASES["multi-token prediction"]  # refused there


def train(processes: int, pattern: str, flags: list[str]) -> tuple[list[str], str]:
    """Run the hybrid example's script; the losses it logs, and all that it prints."""
    hybrid = [*HYBRID_SPEC, f"--hybrid-layer-pattern={pattern}", *ROPE]
    _, printed = forked_run(processes, HYBRID_SCRIPT, *RESUMED, *hybrid, *flags)
    return losses(printed), printed


@pytest.mark.parametrize("case", CASES)
def test_resuming_is_exact(case: str, tmp_path: Path) -> None:
    processes, pattern, flags = CASES[case]
    flags = [*flags, "--save", str(tmp_path), "--save-interval", "3"]
    whole, printed = train(processes, pattern, flags)
    assert len(whole) == 7, printed[-3000:]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    got, printed = train(processes, pattern, [*flags, "--load", str(tmp_path)])
    # the second loss that Megatron logs after a start is the mean of the first two
    assert [got[0], *got[2:]] == [whole[3], *whole[5:]], printed[-3000:]
    assert float(whole[-1]) < float(whole[0]) - 0.1, "it does not train"


def test_segments_may_change_and_settings_may_not(tmp_path: Path) -> None:
    exact = ["--clip-grad", "0", "--untie-embeddings-and-output-weights", "--hidden-dropout", "0"]
    exact += ["--attention-dropout", "0", "--dist-ckpt-optim-fully-reshardable"]
    exact += ["--use-distributed-optimizer"]
    save = ["--save", str(tmp_path), "--save-interval", "3"]
    whole, printed = train(2, "*-|*-", [*exact, *STAGES, *save])
    assert len(whole) == 7, printed[-3000:]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    load = [*exact, "--load", str(tmp_path)]
    for processes, pattern, flags in ((1, "*-*-", []), (2, "*|-*-", STAGES)):
        got, printed = train(processes, pattern, [*load, *flags])
        assert [got[0], *got[2:]] == [whole[3], *whole[5:]], printed[-3000:]
    got, printed = train(1, "*-*-", [*load, "--mhc-sinkhorn-iterations", "5"])
    assert not got and "sinkhorn_iterations is 20 there and 5 here" in printed
