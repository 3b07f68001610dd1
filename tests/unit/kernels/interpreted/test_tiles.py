"""The kernels' loops and sums under Triton's interpreter, with tiles that small inputs fill."""

from collections.abc import Iterator

import pytest
import torch

from megatron_mhc.kernels.arguments import Sizes
from megatron_mhc.kernels.triton import launch, tiles
from megatron_mhc.kernels.triton.passes import phi_gradient, projection
from megatron_mhc.kernels.triton.passes.sums import add_up
from tests.kernel_cases import check


@pytest.fixture(autouse=True)
def other_tiles() -> Iterator[None]:
    """Nothing is left of the tiles before, nor after."""
    launch.forget()
    yield
    launch.forget()


@pytest.mark.parametrize(
    ("dtype", "coefficients_tokens", "splits"),
    [
        (torch.bfloat16, 64, 1),
        (torch.float32, 8, 2),
        pytest.param(torch.bfloat16, 8, 1, marks=pytest.mark.thorough),
        pytest.param(torch.bfloat16, 64, 2, marks=pytest.mark.thorough),
    ],
)
def test_a_program_goes_through_several_tiles(
    dtype: torch.dtype, coefficients_tokens: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One or two programs share the tokens, every tile or every other; `coefficients` has a quarter
    of a tile of `combine_and_project` a program, or a whole. The last block of channels is a
    stub."""
    for kernel in ("combine_and_project", "stream_gradients", "phi_gradient"):
        tile = getattr(tiles, kernel)(4, 168, dtype)._replace(splits=splits)
        assert splits * tile.tokens < 133
        monkeypatch.setattr(tiles, kernel, lambda *_, tile=tile: tile)
    monkeypatch.setattr(
        tiles, "coefficients", lambda *_: tiles.Tile(coefficients_tokens, 1, warps=1)
    )
    monkeypatch.setattr(projection, "MOST_PROGRAMS", splits)
    check("combine_pre", 133, 4, 168, dtype, "cpu", iterations=2)
    check("combine", 133, 4, 168, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_phi_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """n = 8 always; and where the second part of 24 rows is a stub."""
    monkeypatch.setattr(tiles, "rows_at_a_time", lambda rows: 16)
    check("combine_pre", 5, 8, 40, dtype, "cpu", iterations=2)
    check("pre", 19, 4, 40, dtype, "cpu", iterations=2)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 24, 80])
def test_every_row_is_projected_with_all_of_phi(rows: int) -> None:
    """All three bf16 terms of phi, each once: one left out or twice is 2e-6 or more off."""
    n = {24: 4, 80: 8}.get(rows, min(rows, 2))
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(35, n, 40, generator=generator).bfloat16()
    phi = torch.randn(rows, n * 40, generator=generator)
    _, partial = projection.combine_and_project(Sizes.of(x), x, phi, None)
    got = partial.double().sum(1).transpose(1, 2).flatten(0, 1)[:35]
    wide = x.double().flatten(1)
    wanted = torch.cat((wide @ phi.double().t(), wide.square().sum(1, keepdim=True)), dim=1)
    # fp32 sums of n*C terms
    assert bool(((got - wanted).norm(dim=0) < 5e-7 * wanted.norm(dim=0)).all())


def test_phi_gradient_in_more_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens are added up in sums that stay short: 26 of them here, one of them a stub."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(805, 4, 8, generator=generator).bfloat16()
    d_z = torch.randn(805, 24, generator=generator)
    monkeypatch.setattr(phi_gradient, "LONGEST_SUM", 32)
    monkeypatch.setattr(tiles, "phi_gradient", lambda *_: tiles.Tile(32, 128, 4))
    of_phi = phi_gradient.phi_gradient(Sizes.of(y), y, d_z, 24)
    add_up(of_phi)
    got = of_phi.out.double()
    wanted = d_z.double().t() @ y.double().flatten(1)
    assert len(of_phi.partial) == 26
    # fp32 sums of 805 terms
    assert (got - wanted).norm() < 1e-6 * wanted.norm()
