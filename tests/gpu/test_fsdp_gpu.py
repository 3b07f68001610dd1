"""Megatron-FSDP on two GPUs: shards of mHC's parameters are saved, and a run goes on from them.

python -m pytest tests/gpu/test_fsdp_gpu.py -m gpu -q      # starts torchrun itself, three times
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("megatron.core")

from tests.gpu.program import printed
from tests.megatron.common.flags import losses
from tests.megatron.common.launch import NOT_KEPT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="for its fused Adam"),
]
FLAGS = [
    *("--num-layers", "4", "--hidden-size", "512", "--num-attention-heads", "8", "--swiglu"),
    *("--seq-length", "512", "--max-position-embeddings", "512", "--micro-batch-size", "2"),
    *("--global-batch-size", "4", "--train-iters", "7", "--lr", "1e-3", "--weight-decay", "0.1"),
    *("--log-interval", "1", "--eval-iters", "0", "--eval-interval", "10", "--num-workers", "0"),
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "255", "--bf16"),
    *("--normalization", "RMSNorm", "--position-embedding-type", "rope", "--disable-bias-linear"),
    *("--hidden-dropout", "0", "--attention-dropout", "0", "--no-gradient-accumulation-fusion"),
    *("--untie-embeddings-and-output-weights", "--use-distributed-optimizer"),
    *("--overlap-grad-reduce", "--overlap-param-gather", "--mhc", "--mhc-backend", "triton"),
]
FSDP = [
    *("--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor"),
    *("--data-parallel-sharding-strategy", "optim_grads_params"),
]
BF16_ROUNDING = 1e-2
"""Gradients are added in other pieces, and weights are rounded to bf16: 2**-9, seven steps."""


def train(*flags: str) -> list[str]:
    """The losses of a run on two GPUs."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    trains = (*launcher, "-m", "megatron_mhc.run", "examples/pretrain_gpt.py", *FLAGS, *flags)
    # Megatron-FSDP wants several queues; attention's faster backward adds in any order
    dropped = (*NOT_KEPT, "CUDA_DEVICE_MAX_CONNECTIONS")
    exact = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    return losses(printed(*trains, timeout=280, without=dropped, **exact))


def test_shards_train_as_whole_parameters_and_resume_exactly(tmp_path: Path) -> None:
    whole = train(*FSDP, "--save", str(tmp_path), "--save-interval", "3")
    assert len(whole) == 7 and float(whole[-1]) < float(whole[0]) - 0.1
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    got = train(*FSDP, "--load", str(tmp_path))
    # the second loss that Megatron logs after a start is the mean of the first two
    assert [got[0], *got[2:]] == [whole[3], *whole[5:]]
    want = [pytest.approx(float(loss), rel=BF16_ROUNDING) for loss in train()]
    assert [float(loss) for loss in whole] == want
