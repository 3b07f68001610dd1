"""The tiles of the Triton kernels, as numbers: nothing is compiled here."""

from collections.abc import Callable

import pytest
import torch

from megatron_mhc.kernels import triton_config as config


@pytest.mark.parametrize("width", [1280, 2560, 4096, 5120, 7168, 8192])
@pytest.mark.parametrize("kernel", [config.project, config.streams_backward])
def test_real_widths_fill_the_waves_of_an_h100(
    kernel: Callable[[int, int, torch.dtype], config.Tile], width: int
) -> None:
    """At C 2560 waves filled to 61 % cost a fifth of the kernel's time."""
    tile = kernel(4, width, torch.bfloat16)
    programs = -(-width // tile.channels) * tile.splits
    waves = -(-programs // config.RESIDENT)
    assert programs / (waves * config.RESIDENT) > 0.95
