"""What tensors take on a GPU, for the tests there."""

import torch


def requested_bytes() -> int:
    """Bytes that tensors ask for: blocks that hold them can be up to 1 MiB larger, by chance."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]
