"""`overlap_p2p` on real CUDA streams: the same bits in either order, priority and concurrency."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("megatron.core")

from tests.gpu.program import printed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Megatron's local layers, so that Transformer Engine need not be there
STAGE = ["--spec", "local", "--layers", "2", "--sequence", "1024", "--microbatches", "6"]


def pipeline(*flags: str) -> str:
    """What `benchmarks/pipeline/overlap.py` prints; it raises where its own checks fail."""
    return printed("benchmarks/pipeline/overlap.py", *STAGE, *flags, MASTER_PORT="0")


def test_overlap_has_the_bits_of_stock_order_over_jittering_links() -> None:
    printed = pipeline("--equal", "30")
    assert "overlap: 30 steps" in printed and "overlap, 2 in flight: 30 steps" in printed


def test_the_last_combine_runs_on_a_priority_stream_beside_compute(tmp_path: Path) -> None:
    """From the profiler's records; see `profile` there.

    Long sequences: the GPU has to fall behind the host, or no two kernels ever wait together.
    """
    sizes = ["--sequence", "4096", "--microbatches", "4"]
    sizes += ["--hidden", "2048", "--ffn", "5632", "--heads", "16", "--groups", "4"]
    sizes += ["--steps", "2", "--rounds", "1"]
    printed = pipeline(*sizes, "--out", str(tmp_path))
    assert "profiled, overlap:" in printed
    assert (tmp_path / "timeline.png").stat().st_size > 0
