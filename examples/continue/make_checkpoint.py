"""Makes a tiny checkpoint in Hugging Face's format, with the sizes of examples/moe/tiny.sh.

    python examples/continue/make_checkpoint.py deepseek_v4 --output FOLDER

deepseek_v4 is saved by the model class of transformers, whole; for deepseek_v4_1 there is none, so
its file has the hyper-connections alone. All is drawn from a seed, the hyper-connections around an
ordinary residual: streams that are equal pass through as they are, and a sublayer reads their mean.
A mapping of other weights still means something beside them.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAYERS, WIDTH, STREAMS, SEED = 4, 128, 4, 1234


def _normal(*shape: int, std: float) -> Tensor:
    return torch.empty(shape).normal_(std=std)


def draw_site() -> dict[str, Tensor]:
    """A site's fn [n*n + 2n, n*C], base [n*n + 2n] and scale [3], fp32.

    Rows: n of H_pre, about 1/n; n of H_post, about 1; n*n of H_res as [src, dst], about 1 where the
    two are the same stream.
    """
    n = STREAMS
    base = torch.cat(
        [torch.full((n,), -math.log(n - 1)), torch.zeros(n), 3 * torch.eye(n).flatten()]
    )
    return {
        "fn": _normal(len(base), n * WIDTH, std=0.01),
        "base": base + _normal(len(base), std=0.2),
        "scale": 1 + _normal(3, std=0.2),
    }


def draw_head() -> dict[str, Tensor]:
    """The head's fn [n, n*C], base [n] and scale [1], fp32; about the mean of the streams."""
    n = STREAMS
    return {
        "fn": _normal(n, n * WIDTH, std=0.01),
        "base": _normal(n, std=0.2) - math.log(n - 1),
        "scale": 1 + _normal(1, std=0.2),
    }


def save_deepseek_v4(folder: Path) -> None:
    """A whole model, in shards.

    Raises:
        ImportError: transformers is missing, or too old for this model.
    """
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = DeepseekV4Config(
        vocab_size=264,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        hc_mult=STREAMS,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=8,
        q_lora_rank=32,
        o_groups=1,
        o_lora_rank=32,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        moe_intermediate_size=128,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )
    model = DeepseekV4ForCausalLM(config)
    for layer in model.model.layers:
        layer.attn_hc.load_state_dict(draw_site())
        layer.ffn_hc.load_state_dict(draw_site())
    model.model.hc_head.load_state_dict({f"hc_{k}": v for k, v in draw_head().items()})
    model.save_pretrained(folder, max_shard_size="2MB")


def save_deepseek_v4_1(folder: Path) -> None:
    """The hyper-connections, and of config.json what they need.

    Raises:
        ImportError: safetensors is missing.
    """
    from safetensors.torch import save_file

    config: dict[str, Any] = {
        "model_type": "deepseek_v41",
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "hc_mult": STREAMS,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-20,
    }
    tensors = {
        f"layers.{layer}.{site}_{part}": value
        for layer in range(LAYERS)
        for site in ("hc_attn", "hc_ffn")
        for part, value in draw_site().items()
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors")


MODELS = {
    "deepseek_v4": (save_deepseek_v4, "'transformers>=5.24'"),
    "deepseek_v4_1": (save_deepseek_v4_1, "'.[hf]'"),
}
"""What saves each, and what pip installs for it."""


def main() -> None:
    """Reads the command line and writes the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    args = parser.parse_args()
    save, package = MODELS[args.model]
    torch.manual_seed(SEED)
    try:
        save(args.output)
    except ImportError as error:
        parser.error(f"{error}; install it: {sys.executable} -m pip install {package}")
    files = len(list(args.output.glob("*.safetensors")))
    print(f"make_checkpoint: wrote {args.output}, {files} safetensors file(s), seed {SEED}")


if __name__ == "__main__":
    main()
