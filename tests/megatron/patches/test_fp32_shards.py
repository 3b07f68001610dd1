"""The distributed optimizer with mHC's fp32 parameters: loaded, and offloaded to the host."""

from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint

from tests.megatron.patches.test_checkpoint import OFFLOADED, resume, saved_run, train


def phis(folder: Path) -> dict[str, torch.Tensor]:
    """phi of every site in a checkpoint of the model, a tensor for the same site of all layers."""
    metadata = checkpoint.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(of.size, dtype=of.properties.dtype)
        for name, of in metadata.items()
        if name.endswith(".phi")
    }
    checkpoint.load(state, checkpoint_id=str(folder), no_dist=True)
    return state


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("off", ["", "-fp32-offload"])
def test_an_offloaded_optimizer_trains_mhc(off: str, tmp_path: Path) -> None:
    """The stand-in offloads nothing, as a GPU with `--optimizer-offload-fraction 0`: what stays
    on the device is what Megatron forgets."""
    save = ["--save", str(tmp_path), "--save-interval", "3", "--exit-interval", "3"]
    flags = [*OFFLOADED, *save, "--no-save-optim"]
    _, printed = train(2, flags, MEGATRON_MHC_PATCHES=off)
    found = phis(tmp_path / "iter_0000003")
    assert len(found) == 2, printed[-2000:]
    for name, phi in found.items():
        moved = phi.flatten(1).any(1).tolist()  # from zero, where it starts
        assert moved == [not off] * len(phi), name


def test_without_our_patch_it_cannot_be_offloaded() -> None:
    got, printed = train(2, OFFLOADED, MEGATRON_MHC_PATCHES="-fp32-shards")
    assert not got and "can't optimize a non-leaf Tensor" in printed, printed[-2000:]


def test_without_our_patch_it_cannot_load(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, flags, _ = saved_run("bf16 distributed optimizer")
    monkeypatch.setenv("MEGATRON_MHC_PATCHES", "-fp32-shards")
    with pytest.raises(AssertionError, match="a view of a leaf Variable that requires grad"):
        resume(2, folder, flags)
