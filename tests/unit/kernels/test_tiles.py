"""The tiles of the Triton kernels, as numbers: nothing is compiled here."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_mhc.kernels.triton import tiles
from tests.kernel_cases import CARDS

BF16 = torch.bfloat16


def forget() -> None:
    """Have the tiles read anew."""
    for cached in (tiles.tuned, *tiles.TUNABLE.values()):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is read once a process is read for each test, as on an H100."""
    monkeypatch.setattr(tiles, "architecture", lambda: "sm_90")
    monkeypatch.setattr(tiles, "multiprocessors", lambda: 132)
    monkeypatch.setattr(tiles, "shared_memory", lambda: 232_448)
    monkeypatch.delenv(tiles.ENVIRONMENT_VARIABLE, raising=False)
    forget()
    yield
    forget()


def filled(tile: tiles.Tile, width: int, resident: int) -> float:
    """The part of its waves of `resident` programs that a kernel with this tile fills."""
    programs = -(-width // tile.channels) * tile.splits
    waves = -(-programs // resident)
    return programs / (waves * resident)


WIDTHS = [1280, 2560, 4096, 5120, 7168, 8192]


@pytest.mark.parametrize("width", [128, 256, 512, 768, 1024, *WIDTHS])
def test_streams_gradients_fill_the_waves_of_an_h100(width: int) -> None:
    """At C 2560 waves filled to 61 % cost a fifth of the kernel's time."""
    assert filled(tiles.stream_gradients(4, width, BF16), width, 4 * 132) > 0.95


@pytest.mark.parametrize("width", WIDTHS)
def test_the_projection_runs_as_one_wave(width: int) -> None:
    """At C 5120 one wave filled to 91 % takes 277 us, four filled to 98 % 302."""
    tile = tiles.combine_and_project(4, width, BF16)
    blocks = -(-width // tile.channels)
    assert blocks * tile.splits <= 132 < blocks * (tile.splits + 1)
    assert filled(tile, width, 132) > 0.8


@pytest.mark.parametrize("width", WIDTHS)
def test_the_projection_that_reads_runs_as_one_wave_of_two_programs(width: int) -> None:
    """At C 4096 two programs of 64 channels a multiprocessor take 261 us, one of 128 takes 360."""
    tile = tiles.project_delayed(4, width, BF16)
    assert 2 * projections_need(4, BF16, tile) <= tiles.shared_memory()
    blocks = -(-width // tile.channels)
    assert blocks * tile.splits <= 264 < blocks * (tile.splits + 1)
    assert filled(tile, width, 264) > 0.8


@pytest.mark.parametrize("count", [108, 114, 142, 148])
@pytest.mark.parametrize("width", [*WIDTHS, 6144, 9216, 12288])
def test_the_projection_fills_other_cards(
    width: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An A100, a narrower H100, an L40S, a B200."""
    monkeypatch.setattr(tiles, "multiprocessors", lambda: count)
    forget()
    assert filled(tiles.combine_and_project(4, width, BF16), width, count) > 0.8


@pytest.mark.parametrize("width", [6144, 9216, 12288, 128 * 133])
def test_the_projection_takes_more_waves_where_one_stays_empty(width: int) -> None:
    tile = tiles.combine_and_project(4, width, BF16)
    assert tile.splits > 1 and filled(tile, width, 132) > 0.95


def test_a_card_with_fewer_multiprocessors_has_its_own_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_an_h100 = tiles.stream_gradients(4, 4096, BF16)
    monkeypatch.setattr(tiles, "multiprocessors", lambda: 108)  # an A100
    forget()
    of_an_a100 = tiles.stream_gradients(4, 4096, BF16)
    assert filled(of_an_a100, 4096, 4 * 108) > 0.95 > filled(of_an_h100, 4096, 4 * 108)


@pytest.mark.parametrize(("n", "dtype"), [(4, BF16), (8, BF16), (8, torch.float32)])
def test_a_card_with_less_shared_memory_has_smaller_tiles(
    n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_an_h100 = tiles.combine_and_project(n, 4096, dtype)
    monkeypatch.setattr(tiles, "shared_memory", lambda: 166_912)  # an A100
    forget()
    less = tiles.combine_and_project(n, 4096, dtype)
    assert less.channels * less.stages < of_an_h100.channels * of_an_h100.stages


def projections_need(n: int, dtype: torch.dtype, tile: tiles.Tile) -> int:
    """Bytes of shared memory of a `combine_and_project_kernel` that combines and projects.

    phi in tiles of 16 rows, the copies of x and f that are on their way, and what tiles change
    their layout over: compiled for an H100, with bf16 streams, 8,192 bytes at n 4 and 20,608 at
    n 8.
    """
    full, rest = divmod(n * n + 2 * n, 16)
    phi_tiles = 3 * full + 2 * (rest > 0) if dtype == BF16 else full + (rest > 0)
    phi = n * phi_tiles * 16 * tile.channels * (2 if dtype == BF16 else 4)
    copies = (tile.stages - 1) * (n + 1) * tile.tokens * tile.channels * dtype.itemsize
    return phi + copies + (20_608 if n == 8 else 8_192)


@pytest.mark.parametrize("width", [64, *WIDTHS])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_the_tiles_of_every_card_fit_it(
    n: int, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The projection has smaller tiles where there is less shared memory: by what they need of it.

    The others have the same on every card, whatever its number of multiprocessors decides beside:
    those that test_triton_cards.py compiles for the cards with the least.
    """
    chosen: dict[str, set[tuple[int, ...]]] = {}
    for capability, shared_memory, multiprocessors in CARDS.values():
        monkeypatch.setattr(tiles, "architecture", lambda c=capability: f"sm_{c}")
        monkeypatch.setattr(tiles, "shared_memory", lambda s=shared_memory: s)
        monkeypatch.setattr(tiles, "multiprocessors", lambda m=multiprocessors: m)
        forget()
        for kernel in tiles.TUNABLE:
            tile = getattr(tiles, kernel)(n, width, dtype)
            shape = (tile.tokens, tile.channels, tile.warps, tile.stages)
            chosen.setdefault(kernel, set()).add(shape)
            assert tile.splits >= 1
        for projection in (tiles.combine_and_project, tiles.project_delayed):
            assert projections_need(n, dtype, projection(n, width, dtype)) <= shared_memory
        if n == 8:  # compiled in fp32, by the rows of a product of the streams' gradient
            part = tiles.rows_at_a_time(n * n + 2 * n)
            assert {16: 93_184, 128: 155_648}[part] <= shared_memory
    different = {kernel for kernel, shapes in chosen.items() if len(shapes) > 1}
    assert different <= {"combine_and_project", "project_delayed"}


def test_a_projections_need_is_the_compilers() -> None:
    """Compiled for an H100: see docs/measured-facts.md."""
    assert (
        abs(projections_need(4, BF16, tiles.combine_and_project(4, 4096, BF16)) - 171_520) <= 1024
    )
    assert projections_need(8, BF16, tiles.combine_and_project(8, 4096, BF16)) == 180_352


def test_eighty_rows_are_not_padded() -> None:
    assert [tiles.rows_at_a_time(rows) for rows in (4, 24, 80)] == [16, 32, 16]


def use(file: Path, content: object) -> None:
    file.write_text(json.dumps(content))
    forget()


def test_a_file_of_tiles_takes_the_place_of_its_cases_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    others = [(2, 4096, BF16), (4, 2560, BF16), (4, 4096, torch.float32)]
    before = [tiles.combine_and_project(*case) for case in others]
    monkeypatch.setenv(tiles.ENVIRONMENT_VARIABLE, str(tmp_path / "tiles.json"))
    use(
        tmp_path / "tiles.json",
        {"combine_and_project sm_90 n4 C4096 bfloat16": [16, 32, 8, 4, 2, 128]},
    )
    assert tiles.combine_and_project(4, 4096, BF16) == tiles.Tile(16, 32, 8, 4, 2, 128)
    assert [tiles.combine_and_project(*case) for case in others] == before
    assert tiles.stream_gradients(4, 4096, BF16).tokens == 8
    monkeypatch.setattr(tiles, "architecture", lambda: "sm_80")
    forget()
    assert tiles.combine_and_project(4, 4096, BF16).channels == 128


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            {"projct sm_90 n4 C64 bfloat16": [16, 64]},
            "names none of the kernels combine_and_project, project_delayed, coefficients",
        ),
        ({"combine_and_project sm_90 n4 C64 bfloat16": [16]}, "is no tile"),
        ({"combine_and_project sm_90 n4 C64 bfloat16": [16, 48]}, "powers of two"),
        ({"combine_and_project sm_90 n4 C64 bfloat16": [16, 64, 0]}, "is no tile"),
        ({"combine_and_project sm_90 n4 C64 bfloat16": [16, 64, 8, 3]}, "powers of two"),
        ([], "is not what benchmarks/kernels/tune.py --save writes"),
    ],
)
def test_a_file_that_has_something_else_is_refused(
    content: object, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(tiles.ENVIRONMENT_VARIABLE, str(tmp_path / "tiles.json"))
    use(tmp_path / "tiles.json", content)
    with pytest.raises(ValueError, match=says):
        tiles.combine_and_project(4, 4096, BF16)


def test_a_file_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(tiles.ENVIRONMENT_VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json is not what"):
        tiles.combine_and_project(4, 4096, BF16)


def test_what_tuning_saves_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from benchmarks.kernels import tune

    file = tmp_path / "tiles.json"
    for n, width, tokens in ((4, 4096, 8), (4, 2560, 32), (4, 4096, 32), (8, 4096, 16)):
        tune.save(
            file,
            {"combine_and_project": (tokens, 64, 8, 2, 3, 255), "coefficients": (8, 1, 1, 4, 1)},
            n,
            width,
        )
    monkeypatch.setenv(tiles.ENVIRONMENT_VARIABLE, str(file))
    forget()
    assert tiles.combine_and_project(4, 4096, BF16) == tiles.Tile(32, 64, 8, 2, 3, 255)
    assert tiles.combine_and_project(4, 2560, BF16).tokens == 32
    assert tiles.combine_and_project(8, 4096, BF16).tokens == 16
    assert tiles.coefficients(4, 2560, BF16) == tiles.Tile(8, 1, 1, 4, 1)


def test_a_tile_for_the_streams_gradients_serves_where_a_file_names_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiles.json"
    named = {"stream_gradients sm_90 n4 C4096 bfloat16": [4, 32, 8, 2]}
    monkeypatch.setenv(tiles.ENVIRONMENT_VARIABLE, str(file))
    for own in ({}, {"read_gradients sm_90 n4 C4096 bfloat16": [2, 64, 4, 1]}):
        file.write_text(json.dumps(named | own))
        forget()
        wanted = tiles.Tile(2, 64, 4, 1) if own else tiles.Tile(4, 32, 8, 2)
        assert tiles.read_gradients(4, 4096, BF16) == wanted
