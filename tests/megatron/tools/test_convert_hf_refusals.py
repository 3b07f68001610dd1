"""What `convert --from hf` refuses: in a sentence that names the tensor or file, and what to do."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.megatron.common.converting import command, rest
from tests.megatron.common.hf_checkpoints import hyper_connections, write_hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's checkpoints are."""
    return tmp_path_factory.mktemp("hf")


Tensors = dict[str, Tensor]


def _transposed(tensors: Tensors) -> Tensors:
    return tensors | {"layers.0.hc_attn_fn": tensors["layers.0.hc_attn_fn"].t().contiguous()}


def _quantised(tensors: Tensors) -> Tensors:
    return tensors | {"layers.1.hc_ffn_base": torch.ones(24, dtype=torch.int8)}


def _incomplete(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if "layers.1.hc_ffn" not in name}


def _twice(tensors: Tensors) -> Tensors:
    return tensors | {f"vision.{name}": value for name, value in tensors.items()}


REFUSED = {
    "transposed": (
        _transposed,
        {},
        r"layers.0.hc_attn_fn in HF/model-00002-of-00003.safetensors has shape \[32, 24\], expected"
        r" \[24, 32\] \(rows: 4 H_pre, 4 H_post, 16 H_res as \[src, dst\]; columns stream by",
    ),
    "another width": (_transposed, {"hidden_size": 16}, r"expected \[24, 64\]"),
    "quantised": (_quantised, {}, "hc_ffn_base in HF/.*is I8; expected one of F64, F32, F16, BF16"),
    "incomplete": (_incomplete, {}, "HF lacks layers.1.hc_ffn_fn and 2 more, of 2 layers"),
    "none": (lambda tensors: {}, {}, "HF has hyper-connections .* nowhere"),
    "two models": (_twice, {}, "under '' and 'vision.': give a folder with one model"),
    "another model": (
        dict,
        {"model_type": "llama"},
        "has model_type llama; known are deepseek_v4,",
    ),
    "another post": (dict, {"mhc_post_mult_value": 1.5}, "has mhc_post_mult_value 1.5; ours is"),
    "layers": (_incomplete, {"num_hidden_layers": 1}, "rest has 2 layers of width 8, and HF 1 of"),
    "eps": (dict, {"rms_norm_eps": 0}, "norm_eps is 0; expected a number, above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_is_refused_in_a_sentence(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, config, message = REFUSED[case]
    hf = write_hf(
        tmp_path / "hf", "deepseek_v4", change(hyper_connections("deepseek_v4")), **config
    )
    with pytest.raises(SystemExit, match=f"^convert: .*{message.replace('HF', str(hf))}"):
        command(monkeypatch, "--from", "hf", rest(folder), tmp_path / "ours", "--hf", hf)
    assert {file.name for file in tmp_path.iterdir()} == {"hf"}


def _cut(hf: Path) -> None:
    file = hf / "model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _no_header(hf: Path) -> None:
    (hf / "model-00001-of-00003.safetensors").write_bytes(b"\xff" * 20)


def _wrong_index(hf: Path) -> None:
    index = hf / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("hc_ffn_scale", "hc_ffn_scales"))


BROKEN = {
    "shard missing": (
        lambda hf: (hf / "model-00002-of-00003.safetensors").unlink(),
        "HF/model-00002-of-00003.safetensors is missing, and model.safetensors.index.json names it",
    ),
    "shard cut": (_cut, "HF/model-00001-of-00003.safetensors is no whole safetensors file"),
    "no header": (_no_header, "model-00001-of-00003.safetensors is no whole safetensors file"),
    "index wrong": (_wrong_index, "index.json says that .*hc_ffn_scales is in .*, and it is not"),
    "config missing": (lambda hf: (hf / "config.json").unlink(), "HF has no config.json"),
    "config cut": (lambda hf: (hf / "config.json").write_text("{"), "config.json is no JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_in_a_sentence(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, message = BROKEN[case]
    hf = write_hf(tmp_path / "hf", "deepseek_v4", hyper_connections("deepseek_v4"))
    spoil(hf)
    with pytest.raises(SystemExit, match=f"^convert: .*{message.replace('HF', str(hf))}"):
        command(monkeypatch, "--from", "hf", rest(folder), tmp_path / "ours", "--hf", hf)
    assert {file.name for file in tmp_path.iterdir()} == {"hf"}
