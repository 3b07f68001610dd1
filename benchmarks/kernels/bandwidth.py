"""What a device-to-device copy moves: the yardstick of the kernels' benchmarks."""

import torch
from triton.testing import do_bench


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, reads and writes counted."""
    source = torch.empty(2**29, device="cuda", dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)
