"""`overlap_p2p` on real CUDA streams: the same bits in either order, priority and concurrency."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("megatron.core")

from tests.megatron.common.launch import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Megatron's local layers, so that Transformer Engine need not be there
STAGE = ["--spec", "local", "--layers", "2", "--sequence", "1024", "--microbatches", "6"]


def pipeline(*flags: str) -> str:
    """What `benchmarks/pipeline/overlap.py` prints; it raises where its own checks fail."""
    done = subprocess.run(
        [sys.executable, "benchmarks/pipeline/overlap.py", *STAGE, *flags],
        cwd=ROOT,
        env=os.environ | {"MASTER_PORT": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


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
