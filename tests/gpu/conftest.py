"""Megatron-Core on this machine's GPU, for tests that build models in this process."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned_memory() -> None:
    """Fill the allocator's free memory with NaN, so that a value nobody wrote shows."""
    for size in (2**31, 2**27, 2**24, 2**20, 2**16):
        torch.full((size // 4,), float("nan"), device="cuda")


@pytest.fixture(scope="module")
def megatron() -> Iterator[None]:
    """Megatron-Core with Transformer Engine, alone on this GPU, its algorithms deterministic."""
    pytest.importorskip("transformer_engine")
    chosen = {
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    # Megatron keeps the first scale's shape for good, and schedules give it another than tests do
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
