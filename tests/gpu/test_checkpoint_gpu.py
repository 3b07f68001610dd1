"""On a GPU too: a run that is killed in the middle of a save goes on from the one before."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("megatron.core")

from tests.megatron.common.kill_in_save import check_a_kill_in_mid_save
from tests.megatron.common.launch import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FLAGS = [
    *("--num-layers", "4", "--hidden-size", "512", "--num-attention-heads", "8"),
    *("--seq-length", "512", "--max-position-embeddings", "512", "--micro-batch-size", "2"),
    *("--global-batch-size", "4", "--lr", "1e-3", "--weight-decay", "0.1", "--log-interval", "1"),
    *("--eval-iters", "0", "--eval-interval", "10", "--num-workers", "0", "--mock-data"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "255", "--bf16"),
    *("--hidden-dropout", "0", "--attention-dropout", "0", "--no-gradient-accumulation-fusion"),
    *("--ckpt-format", "torch_dist", "--mhc", "--mhc-backend", "triton"),
]
LOCAL = ["--transformer-impl", "local", "--no-persist-layer-norm", "--no-masked-softmax-fusion"]
OPTIMIZERS = {
    "plain optimizer": [],
    "distributed optimizer": ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"],
}


def run(script: str, *flags: str) -> tuple[int, str]:
    """Train on this GPU; the exit status and all that was printed."""
    layers = [] if find_spec("transformer_engine") else [*LOCAL, "--no-rope-fusion"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_mhc.run", script, *FLAGS, *layers, *flags],
            cwd=ROOT,
            # Transformer Engine's attention has a faster backward that adds in any order
            env={**os.environ, "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(200)
        finally:
            # a killed process leaves its writers behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        return process.returncode, log.read()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_killed_in_mid_save_goes_on_from_the_one_before(
    optimizer: str, tmp_path: Path
) -> None:
    flags = OPTIMIZERS[optimizer]
    whole, resumed = check_a_kill_in_mid_save(
        lambda script, *more: run(script, *flags, *more), tmp_path
    )
    assert resumed == whole
