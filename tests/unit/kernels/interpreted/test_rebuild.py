"""`rebuild` under Triton's interpreter: forward only, and bit for bit."""

import pytest
import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from megatron_mhc import kernels
from megatron_mhc.kernels.triton import launch, tiles
from tests.kernel_cases import check_rebuild, inputs

CASES = [(5, 4, 131, 7), (1, 1, 33, 1), (9, 2, 40, 2), (3, 8, 40, 6), (0, 4, 24, 3)]
BOTH = [
    *(pytest.param(torch.bfloat16, case) for case in CASES),
    *(
        # the two slow ones: the others show fp32 as well, and bf16 these shapes
        pytest.param(torch.float32, case, marks=[pytest.mark.thorough] * (case[3] > 5))
        for case in CASES
    ),
]


@pytest.mark.parametrize(("dtype", "case"), BOTH, ids=str)
def test_rebuild_equals_the_forward_to_the_bit(dtype: torch.dtype, case: tuple) -> None:
    """One site alone, several launches, an odd width, every n, no tokens."""
    check_rebuild(*case, dtype, "cpu")


@pytest.mark.parametrize("boundaries", [1, 3, 8])
def test_loads_ahead_of_stores_change_no_bit(
    boundaries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a file may name any tile: few boundaries a launch or all, a site's loads early or not."""
    tile = tiles.Tile(tokens=2, channels=64, splits=boundaries, warps=4, stages=2)
    monkeypatch.setattr(tiles, "rebuild", lambda *_: tile)
    launch.forget()
    check_rebuild(5, 4, 131, 7, torch.bfloat16, "cpu")
    launch.forget()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autograd_sees_that_given_tensors_are_written(backend: str) -> None:
    x, weights, f, h_post, h_res = _site()
    y, u, seen = torch.empty_like(x), torch.empty_like(f), torch.ones_like(x, requires_grad=True)
    loss = (seen * y).sum()
    kernels.rebuild(
        x, [weights] * 2, [(f, h_post, h_res, None)], ys=[y], us=[u, f * 0], backend=backend
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_without_memory_at_hand_are_refused() -> None:
    x, weights, f, h_post, h_res = _site()
    ended = [(AsyncCollectiveTensor(f), h_post, h_res, None)]
    with pytest.raises(TypeError, match="rebuild was given AsyncCollectiveTensor"):
        kernels.rebuild(x, [weights] * 2, ended, backend="triton")


def _site() -> list[torch.Tensor]:
    """x, h_pre, f, h_post, h_res of three tokens."""
    given = inputs("combine_read", 3, 2, 8, torch.float32, "cpu")
    return [given[name].detach() for name in ("x", "h_pre", "f", "h_post", "h_res")]
