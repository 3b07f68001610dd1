"""`examples/continue/`: hyper-connections from Hugging Face's format, trained and written back."""

import re
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from tests.megatron.common.flags import numbered_losses
from tests.megatron.common.launch import ROOT
from tests.megatron.common.scripts import launch

MODELS = ("deepseek_v4", "deepseek_v4_1")
N, LAYERS = 4, 4
SMALL = ["--seq-length", "64", "--max-position-embeddings", "64", "--eval-iters", "0"]
# of the rest's run and of both pieces; a piece of one iteration moves nothing: its rate is 0
PIECES = ["--exit-interval", "4"]
SITES = {"hc_attn": "attention_connection", "hc_ffn": "mlp_connection"}
PARTS = {"fn": "phi", "base": "bias", "scale": "alpha"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both runs and their data are."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, runs: Path) -> tuple[Path, str]:
    """What a script leaves behind and prints, of eight iterations."""
    if request.param == "deepseek_v4":
        pytest.importorskip("transformers.models.deepseek_v4", reason="no transformers of 5.24")
    noting = str(ROOT / "tests/megatron/examples/noting_pretrain.py")
    settings = {"RUNS": str(runs), "ITERATIONS": "8", "SCRIPT": noting}
    done = launch(f"continue/{request.param}.sh", *SMALL, *PIECES, **settings)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return runs / f"{request.param}-mhc", done.stdout


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that the safetensors of a folder have, by the names that DeepSeek published."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= {name.removeprefix("model."): value for name, value in load_file(file).items()}
    return found


def by_our_names(folder: Path) -> dict[str, Tensor]:
    """Its hyper-connections as a model of ours names and orders them."""
    theirs = tensors(folder)
    # 2n + dst*n + src of ours is 2n + src*n + dst there
    rows = [*range(2 * N), *(2 * N + src * N + dst for dst in range(N) for src in range(N))]
    found = {}
    for layer in range(LAYERS):
        for site, mine in SITES.items():
            for part, name in PARTS.items():
                value = theirs[f"layers.{layer}.{site}_{part}"]
                key = f"decoder.layers.{layer}.{mine}.{name}"
                found[key] = value if part == "scale" else value[rows]
    last = f"decoder.layers.{LAYERS - 1}.head"
    heads = {k: v for k, v in theirs.items() if k.startswith("hc_head")}
    return found | {f"{last}.{k.rpartition('_')[2]}": v for k, v in heads.items()}


def checkpoint(folder: Path) -> dict[str, Tensor]:
    """The hyper-connections in a checkpoint of Megatron's, as it stores them."""
    metadata = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    wanted = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in metadata.items()
        if re.match(r"decoder\.layers\.\d\.(\w+_connection|head)\.\w+$", key)
    }
    load(wanted, checkpoint_id=str(folder), no_dist=True)
    return wanted


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


def test_it_goes_on_from_the_imported_numbers_and_writes_the_trained_ones(
    run: tuple[Path, str],
) -> None:
    folder, _ = run
    imported = by_our_names(folder / "hf")
    is_v4 = "deepseek_v4-" in folder.name
    assert len(imported) == 2 * LAYERS * 3 + 3 * is_v4
    for name, value in imported.items():
        if "connection.phi" in name or "connection.bias" in name:
            square = value[2 * N :].unflatten(0, (N, N))
            assert not torch.equal(square, square.transpose(0, 1)), "its order could not be told"
    assert_equal(checkpoint(folder / "start" / "release"), imported)
    assert_equal(torch.load(folder / "first_forward_0.pt"), imported)
    # training moves every tensor; a resume begins where the first piece stopped
    first, last = (checkpoint(folder / "checkpoints" / f"iter_000000{i}") for i in (4, 8))
    assert_equal(torch.load(folder / "first_forward_4.pt"), first)
    for before, after in ((imported, first), (first, last)):
        assert before.keys() == after.keys()
        assert not [name for name in before if torch.equal(before[name], after[name])]
    assert_equal(by_our_names(folder / "trained"), last)
    # what is no hyper-connection is in the copy as it was
    given, back = tensors(folder / "hf"), tensors(folder / "trained")
    assert given.keys() == back.keys()
    rest = [name for name in given if "hc_" not in name]
    assert (len(rest) > 50) == is_v4
    assert all(torch.equal(given[name], back[name]) for name in rest)


def test_the_loss_falls_and_the_output_says_what_was_done(run: tuple[Path, str]) -> None:
    folder, printed = run
    ordinary, trained = printed.split("== training from ")
    logged = [numbered_losses(part) for part in (ordinary, *trained.split("== resuming"))]
    steps = [[step for step, _ in lines] for lines in logged]
    assert steps == [[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]]
    rest, first, last = ([float(loss) for _, loss in lines] for lines in logged)
    # the weights of the rest are in it; then it falls by more than single batches differ
    assert first[0] < rest[0] - 1 and fmean(last) < fmean(first) - 0.3
    name = folder.name.removesuffix("-mhc")
    assert "mHC is on" not in ordinary
    assert trained.count(f"mHC is on: 4 streams, variant mhc, convention {name},") == 2
    distances = [float(number) for number in re.findall(r"^compare: (\S+) at most", trained, re.M)]
    assert distances[0] == distances[-1] == 0 and 0 < distances[1] < distances[2], distances


@pytest.mark.parametrize("model", MODELS)
def test_without_the_packages_it_says_at_once_what_to_install(model: str, tmp_path: Path) -> None:
    for name in ("transformers", "safetensors"):  # found before the installed ones, and empty
        (tmp_path / f"{name}.py").touch()
    done = launch(f"continue/{model}.sh", PYTHONPATH=str(tmp_path), RUNS=str(tmp_path / "runs"))
    assert done.returncode == 2
    assert re.search(r"pip install '(transformers>=|\.\[hf\])", done.stderr), done.stderr
    assert not list((tmp_path / "runs").rglob("*"))


@pytest.mark.parametrize("setting", [{"MHC": "0"}, {"MINUTES": "1"}, {"CHECK": "1"}])
def test_settings_of_the_other_scripts_that_mean_nothing_here_are_named(
    setting: dict[str, str], tmp_path: Path
) -> None:
    done = launch("continue/deepseek_v4.sh", RUNS=str(tmp_path), **setting)
    assert done.returncode == 2 and "MHC=0, MINUTES and CHECK are of no use here" in done.stderr
