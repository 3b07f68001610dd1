"""Hugging Face checkpoints for the tests of `convert`: tiny, written without any package."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

N, WIDTH, LAYERS, ITERATIONS, EPS = 4, 8, 2, 7, 1e-6
ROWS = N * N + 2 * N
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"rms_norm_eps": 1e-6, "prefix": "", "head": True},
    "deepseek_v41": {"rms_norm_eps": 1e-20, "prefix": "", "head": False},
    "glm5_next": {"rms_norm_eps": 1e-5, "prefix": "model.language_model.", "head": False},
}
CONVENTIONS = {
    "deepseek_v4": "deepseek_v4",
    "deepseek_v41": "deepseek_v4_1",
    "glm5_next": "glm_5_3",
}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}


def write_safetensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """The format's own words: header's length, header, bytes."""
    header, data = {}, b""
    for name, value in tensors.items():
        raw = bytes(value.contiguous().flatten().view(torch.uint8).tolist())
        place = [len(data), len(data) + len(raw)]
        header[name] = {
            "dtype": DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": place,
        }
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def hyper_connections(model: str, width: int = WIDTH) -> dict[str, Tensor]:
    """Its parameters by name, drawn; rows of fn and base in its order; GLM's fn is in bf16."""
    generator = torch.Generator().manual_seed(5)
    about = MODELS[model]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = {}
    for layer in range(LAYERS):
        for site in ("hc_attn", "hc_ffn"):
            name = f"{about['prefix']}layers.{layer}.{site}"
            fn = normal(ROWS, N * width)
            found[f"{name}_fn"] = fn.bfloat16() if model == "glm5_next" else fn
            found[f"{name}_base"], found[f"{name}_scale"] = normal(ROWS), normal(3)
    if about["head"]:
        found |= {"hc_head_fn": normal(N, N * width), "hc_head_base": normal(N)}
        found["hc_head_scale"] = normal(1)
    return found


def write_hf(
    folder: Path, model: str, tensors: dict[str, Tensor], shards: int = 3, **config: Any
) -> Path:
    """A checkpoint with these tensors and one of no hyper-connection, in so many files."""
    folder.mkdir()
    prefix = MODELS[model]["prefix"]
    tensors = {f"{prefix}layers.0.attn.wq.weight": torch.ones(3, 2)} | tensors
    numbers = {
        "hc_mult": N,
        "hc_sinkhorn_iters": ITERATIONS,
        "hc_eps": EPS,
        "rms_norm_eps": MODELS[model]["rms_norm_eps"],
        "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH,
        **config,
    }
    whole: dict[str, Any] = {"model_type": model} | (
        {"text_config": numbers | {"model_type": f"{model}_text"}} if prefix else numbers
    )
    (folder / "config.json").write_text(json.dumps(whole))
    (folder / "tokenizer.json").write_text("{}")
    for name in ("encoding", ".cache"):
        (folder / name).mkdir()
        (folder / name / "file").write_text(name)
    names = list(tensors)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard::shards]
        write_safetensors(folder / file, {name: tensors[name] for name in mine})
        weight_map |= {name: file for name in mine}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def theirs(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre, H_post and comb [src, dst] of a site as these models compute them.

    Args:
        x: [T, n, C].
        fn, base, scale: as they are stored.
        norm_eps: the model's `rms_norm_eps`.
    """
    flat = x.flatten(-2).float()
    z = flat @ fn.float().t() * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    pre, post, comb = (
        part * s + b
        for part, s, b in zip(
            z.split([N, N, N * N], -1), scale.split(1), base.split([N, N, N * N]), strict=True
        )
    )
    mix = comb.unflatten(-1, (N, N)).softmax(-1) + EPS
    mix = mix / (mix.sum(-2, keepdim=True) + EPS)
    for _ in range(ITERATIONS - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + EPS)
        mix = mix / (mix.sum(-2, keepdim=True) + EPS)
    return pre.sigmoid() + EPS, 2 * post.sigmoid(), mix
