"""A run that stops, saves and resumes has the losses of one that does not, digit for digit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.megatron.launch import ROOT

FLAGS = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", "16", "--max-position-embeddings", "16", "--micro-batch-size", "2"),
    *("--global-batch-size", "4", "--train-iters", "7", "--lr", "2e-2", "--weight-decay", "0.1"),
    *("--eval-iters", "0", "--eval-interval", "10", "--log-interval", "1"),
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
    *("--bf16", "--ckpt-format", "torch_dist", "--mhc"),
]
DISTRIBUTED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
CASES: dict[str, tuple[int, list[str]]] = {
    "bf16": (1, []),
    "bf16 learned head": (1, ["--mhc-convention", "deepseek_v4"]),
    "bf16 distributed optimizer": (2, DISTRIBUTED),
    "bf16 tensor and sequence parallel": (
        2,
        ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    ),
}


def train(processes: int, flags: list[str], **environment: str) -> tuple[list[str], str]:
    """Run the example's script; the losses it logs, and all that it prints."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), "-m", "megatron_mhc.run", "--cpu"),
        *("examples/pretrain_gpt.py", *FLAGS, *flags),
    ]
    threads = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **threads, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return re.findall(r"iteration +\d+/.*lm loss: (\S+)", done.stdout), done.stdout


@pytest.mark.parametrize("case", CASES)
def test_resuming_is_exact(case: str, tmp_path: Path) -> None:
    processes, flags = CASES[case]
    flags = [*flags, "--save", str(tmp_path), "--save-interval", "3"]
    whole, printed = train(processes, flags)
    assert len(whole) == 7, printed[-3000:]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    resumed, printed = train(processes, [*flags, "--load", str(tmp_path)])
    assert len(resumed) == 4, printed[-3000:]
    # the second loss that Megatron logs after a start is the mean of the first two
    assert [resumed[0], *resumed[2:]] == [whole[3], *whole[5:]]
    assert float(whole[-1]) < float(whole[0]) - 0.1, "it does not train"


def test_without_our_patch_megatron_cannot_save(tmp_path: Path) -> None:
    """What `optimizer-checkpoint` is for; when Megatron mends it, this says so."""
    flags = ["--save", str(tmp_path), "--save-interval", "3"]
    ids = ("optimizer-checkpoint", "optimizer-checkpoint-map", "optimizer-checkpoint-load")
    off = {"MEGATRON_MHC_PATCHES": ",".join(f"-{patch}" for patch in ids)}
    _, printed = train(1, [*flags, "--exit-interval", "3"], **off)
    assert "does not match model shape" in printed, printed[-2000:]
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()
