"""`convert --from hf` and `--to hf`: hyper-connections of DeepSeek-V4, V4.1 and GLM-5.3."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_mhc import MHCConfig
from megatron_mhc.model.connection import Head, HyperConnection
from megatron_mhc.tools.convert import read_metadata
from megatron_mhc.tools.hf_sites import state_dict_of
from megatron_mhc.tools.safetensors_files import find_tensors
from megatron_mhc.tools.site_items import Layout, Sites, read_sites
from tests.megatron.common.converting import command, go_on, logits_of, ordinary, rest
from tests.megatron.common.hf_checkpoints import (
    CONVENTIONS,
    EPS,
    ITERATIONS,
    LAYERS,
    MODELS,
    WIDTH,
    N,
    hyper_connections,
    theirs,
    write_hf,
)
from tests.megatron.common.native_records import COMMON

EQUAL = {"rtol": 1e-5, "atol": 1e-5}
"""Of fp32 whose sums go in another order: H is at most 2, streams and logits of H about 10."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's checkpoints are."""
    return tmp_path_factory.mktemp("hf")


def stored(checkpoint: Path) -> tuple[MHCConfig, Sites]:
    """What a checkpoint with mHC has."""
    metadata = read_metadata(checkpoint)
    return read_sites(checkpoint, metadata, Layout(metadata.state_dict_metadata))


def connection(mhc: MHCConfig, sites: Sites, layer: int, name: str, width: int) -> HyperConnection:
    """A site of ours with these parameters."""
    made = HyperConnection(mhc, width, 0)
    made.load_state_dict({p: sites.layers[layer, f"{name}.{p}"] for p in ("phi", "alpha", "bias")})
    return made


def streams(scale: float) -> Tensor:
    """Some tokens' streams."""
    return scale * torch.randn(5, N, WIDTH, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_sites_compute_the_same_and_go_back_digit_for_digit(
    model: str,
    shards: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = hyper_connections(model)
    hf = write_hf(tmp_path / "hf", model, tensors, shards)
    command(monkeypatch, "--from", "hf", rest(folder), tmp_path / "ours", "--hf", hf)
    printed = capsys.readouterr().out
    assert f"{model}: convention {CONVENTIONS[model]}\n" in printed and "4 sites mapped" in printed
    made = tmp_path / "ours" / "release"
    mhc, sites = stored(made)
    assert mhc == MHCConfig(convention=CONVENTIONS[model], sinkhorn_iterations=ITERATIONS)
    for x in (streams(1.0), streams(1e-3)):
        for layer in range(LAYERS):
            for site, name in (("hc_attn", "attention_connection"), ("hc_ffn", "mlp_connection")):
                given = [
                    tensors[f"{MODELS[model]['prefix']}layers.{layer}.{site}_{part}"]
                    for part in ("fn", "base", "scale")
                ]
                pre, post, comb = theirs(x, *given, MODELS[model]["rms_norm_eps"])
                ours = connection(mhc, sites, layer, name, WIDTH)
                h_pre = pre if mhc.delayed else None
                got = ours(x.flatten(-2), h_pre=h_pre)
                torch.testing.assert_close(got.u, (pre.unsqueeze(-1) * x).sum(-2), **EQUAL)
                torch.testing.assert_close(got.h_post, post, **EQUAL)
                torch.testing.assert_close(got.h_res, comb.mT, **EQUAL)
                if mhc.delayed:
                    torch.testing.assert_close(got.next_pre, pre, **EQUAL)
    # and a model loads it
    settings = {"convention": CONVENTIONS[model], "sinkhorn_iterations": ITERATIONS}
    assert logits_of(kind="ours", mhc=settings, load=str(made)).isfinite().all()
    command(monkeypatch, "--to", "hf", tmp_path / "ours", tmp_path / "back", "--hf", hf)
    assert f"{len(tensors)} tensors put in their places" in capsys.readouterr().out
    back = {file for file in (tmp_path / "back").rglob("*") if file.is_file()}
    assert len(back) == len([file for file in hf.rglob("*") if file.is_file()]) - 1
    for file in back:
        original = hf / file.relative_to(tmp_path / "back")
        if file.suffix != ".safetensors":
            assert file.read_bytes() == original.read_bytes(), file
            continue
        got, want = load_file(file), load_file(original)
        assert got.keys() == want.keys(), file
        for name, value in want.items():
            assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
    assert not (tmp_path / "back" / ".cache").exists()


def test_the_head_is_mapped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = hyper_connections("deepseek_v4")
    hf = write_hf(tmp_path / "hf", "deepseek_v4", tensors)
    command(monkeypatch, "--from", "hf", rest(folder), tmp_path / "ours", "--hf", hf)
    mhc, sites = stored(tmp_path / "ours" / "release")
    head = Head(mhc, WIDTH)
    head.load_state_dict(sites.head)
    x = streams(1.0)
    flat = x.flatten(-2)
    z = flat @ tensors["hc_head_fn"].t() * (flat.square().mean(-1, keepdim=True) + EPS).rsqrt()
    weights = (z * tensors["hc_head_scale"] + tensors["hc_head_base"]).sigmoid() + EPS
    torch.testing.assert_close(head(x), (weights.unsqueeze(-1) * x).sum(-2), **EQUAL)


def test_training_goes_on_from_it_with_the_flags_that_are_printed(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hf = write_hf(tmp_path / "hf", "glm5_next", hyper_connections("glm5_next", 32), hidden_size=32)
    source = ordinary("dense", folder)
    command(monkeypatch, "--from", "hf", source, tmp_path / "start", "--hf", hf)
    flags = capsys.readouterr().out.split("train with ")[1].split(" --load")[0].split()
    assert flags == ["--mhc", "--mhc-sinkhorn-iterations", "7", "--mhc-convention", "glm_5_3"]
    losses = go_on("dense", tmp_path / "start", *flags)
    assert len(losses) == 7 and losses[0] != go_on("dense", source, "--finetune")[0]


@pytest.mark.parametrize("lacks", ["all", "one"])
@pytest.mark.parametrize("shards", [1, 3])
def test_trained_sites_go_into_a_checkpoint_that_lacks_them(
    shards: int,
    lacks: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a mapping of the rest writes it; the names are then those that were published."""
    mhc = {"convention": "glm_5_3", "sinkhorn_iterations": ITERATIONS}
    logits_of(kind="ours", mhc=mhc, save=str(tmp_path / "ours"), args=COMMON)
    tensors = hyper_connections("glm5_next")
    kept = {} if lacks == "all" else dict(list(tensors.items())[1:])
    hf = write_hf(tmp_path / "hf", "glm5_next", kept, shards)
    command(monkeypatch, "--to", "hf", tmp_path / "ours", tmp_path / "new", "--hf", hf)
    printed = capsys.readouterr().out
    missing = 12 - len(kept)
    assert f"{missing} tensors that {hf} lacks are in hyper-connections.safetensors" in printed
    assert ("rounded by" in printed) == bool(kept), "three of fn are in bf16 there"
    places = find_tensors(tmp_path / "new", lambda name: True)
    assert places.keys() == {*tensors, "model.language_model.layers.0.attn.wq.weight"}
    files = {place.file.name for place in places.values()}
    assert ("model-00001-of-00002.safetensors" in files) == (shards == 1)
    assert not (tmp_path / "new" / "model.safetensors").exists()
    assert (tmp_path / "new" / "tokenizer.json").is_file()
    got, settings = state_dict_of(tmp_path / "new")[1], stored(tmp_path / "ours")
    for (layer, name), value in settings[1].layers.items():
        mine = got[f"decoder.layers.{layer}.{name}"]
        if kept and name.endswith("phi") and (layer, name) != (0, "attention_connection.phi"):
            value = value.bfloat16().float()
        assert torch.equal(mine, value), name


def test_alone_they_are_written_in_fp32_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mhc = {"convention": "deepseek_v4", "norm_eps": 1e-20, "sinkhorn_iterations": ITERATIONS}
    logits_of(kind="ours", mhc=mhc, save=str(tmp_path / "ours"), args=COMMON)
    command(monkeypatch, "--to", "hf", tmp_path / "ours", tmp_path / "new")
    assert "hc_eps 1e-06, rms_norm_eps 1e-20" in capsys.readouterr().out
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    wanted = hyper_connections("deepseek_v4")
    assert index["weight_map"].keys() == wanted.keys()
    assert index["metadata"]["total_size"] == 4 * sum(v.numel() for v in wanted.values())
    places = find_tensors(tmp_path / "new", lambda name: True)
    assert {name: place.shape for name, place in places.items()} == {
        name: tuple(value.shape) for name, value in wanted.items()
    }
    assert {place.dtype for place in places.values()} == {"F32"}


@pytest.mark.parametrize("model", ["deepseek_v4", "deepseek_v41"])
def test_what_has_no_counterpart_is_said(
    model: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # the second is named as layers of the model are
    names = ("mtp.0.hc_attn_fn", "mtp.layers.0.hc_attn_fn")
    draft = {name: torch.zeros(2, 2) for name in names}
    tensors, engram = hyper_connections(model) | draft, [1]
    hf = write_hf(tmp_path / "hf", model, tensors, engram_layer_ids=engram)
    command(monkeypatch, "--from", "hf", rest(folder), tmp_path / "ours", "--hf", hf)
    printed = capsys.readouterr().out
    named = ", ".join(names)
    assert f"no counterpart: {named}\n" in printed
    assert "no counterpart: Engram in front of layers [1]\n" in printed
    command(monkeypatch, "--to", "hf", tmp_path / "ours", tmp_path / "back", "--hf", hf)
    assert f"left as they are in {hf}: {named}" in capsys.readouterr().out


def test_another_models_checkpoint_takes_no_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mhc = {"convention": "glm_5_3", "sinkhorn_iterations": ITERATIONS}
    logits_of(kind="ours", mhc=mhc, save=str(tmp_path / "ours"), args=COMMON)
    hf = write_hf(tmp_path / "hf", "deepseek_v4", hyper_connections("deepseek_v4"))
    message = "norm_eps is 1e-06 there and 1e-05 in the checkpoint, end is head there and mean in"
    with pytest.raises(SystemExit, match=f"computes something else: {message}"):
        command(monkeypatch, "--to", "hf", tmp_path / "ours", tmp_path / "new", "--hf", hf)
    assert not (tmp_path / "new").exists()
