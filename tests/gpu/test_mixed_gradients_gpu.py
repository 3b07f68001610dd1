"""Gradients in two dtypes on a GPU: bf16 ones, and mHC's in fp32, as the precision-aware optimizer
has them with `--grad-reduce-in-bf16`. Transformer Engine's kernels measure and clip them."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("megatron.core")

from tests.gpu.program import printed
from tests.megatron.common.flags import losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="for its fused Adam"),
]
FLAGS = [
    *("--num-layers", "4", "--hidden-size", "512", "--num-attention-heads", "8"),
    *("--seq-length", "512", "--max-position-embeddings", "512", "--micro-batch-size", "2"),
    *("--global-batch-size", "4", "--train-iters", "6", "--lr", "1e-3", "--weight-decay", "0.1"),
    *("--eval-iters", "0", "--eval-interval", "10", "--num-workers", "0", "--mock-data"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "255", "--bf16", "--log-interval", "1"),
    *("--hidden-dropout", "0", "--attention-dropout", "0", "--no-gradient-accumulation-fusion"),
    *("--use-distributed-optimizer", "--grad-reduce-in-bf16"),
    *("--mhc", "--mhc-backend", "triton"),
]
BF16_ROUNDING = 1e-2
"""The gradients are the same; an update is rounded to bf16, 2**-9, in another place, six steps."""


def train(*flags: str, steps: int = 6) -> tuple[list[float], list[float]]:
    """The losses and the gradients' norms of a run of so many steps."""
    trains = ("-m", "megatron_mhc.run", "examples/pretrain_gpt.py")
    text = printed(*trains, *FLAGS, *flags, NVTE_ALLOW_NONDETERMINISTIC_ALGO="0")
    norms = [float(norm) for norm in re.findall(r"grad norm: (\S+)", text)]
    found = [float(loss) for loss in losses(text)]
    assert len(found) == len(norms) == steps, text[-3000:]
    return found, norms


def test_the_precision_aware_optimizer_clips_as_the_usual_one() -> None:
    """The norm is above 1, so every step is clipped by it."""
    want, wanted_norms = train()
    got, norms = train("--use-precision-aware-optimizer")
    assert wanted_norms[0] > 1.5
    assert norms[0] == pytest.approx(wanted_norms[0], rel=1e-3)
    assert norms == pytest.approx(wanted_norms, rel=10 * BF16_ROUNDING)
    assert got == pytest.approx(want, rel=BF16_ROUNDING)
    assert got[-1] < got[0]


def test_a_run_of_the_precision_aware_optimizer_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """It keeps 16 bits more of a bf16 parameter, and all of one that is fp32 itself."""
    precise = ["--use-precision-aware-optimizer", "--save", str(tmp_path), "--save-interval", "3"]
    whole, norms = train(*precise)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    got, again = train(*precise, "--load", str(tmp_path), steps=3)
    # the second loss that Megatron logs after a start is the mean of the first two
    assert [got[0], got[2]] == [whole[3], whole[5]]
    assert again == norms[3:]
