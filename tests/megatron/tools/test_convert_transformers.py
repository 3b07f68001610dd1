"""`convert --from hf`: sites of transformers' own models at their own hidden states, in fp32."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mhc import kernels
from megatron_mhc.model.connection import Head, HyperConnection
from megatron_mhc.tools.hf_sites import state_dict_of

transformers = pytest.importorskip(
    "transformers.models.glm5_next", reason="no transformers of 5.24 or later is installed"
)

LAYERS, WIDTH, N = 2, 16, 4
EQUAL = {"rtol": 1e-5, "atol": 1e-5}
"""Of fp32 whose sums go in another order, relative to streams and coefficients of about 1."""
EPS = {"norm_eps": "rms_norm_eps", "pre_eps": "hc_eps", "sinkhorn_eps": "hc_eps"}
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
}


def deepseek_v4(**eps: float) -> Any:
    """A tiny model and its decoder."""
    path = "transformers.models.deepseek_v4"
    config = importlib.import_module(f"{path}.configuration_deepseek_v4").DeepseekV4Config(
        **SIZES,
        **eps,
        qk_rope_head_dim=4,
        head_dim=8,
        o_groups=1,
        o_lora_rank=8,
        n_shared_experts=1,
        layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
        mlp_layer_types=["hash_moe", "moe"],
    )
    model = importlib.import_module(f"{path}.modeling_deepseek_v4").DeepseekV4ForCausalLM(config)
    return model, model.model


def glm_5_3(**eps: float) -> Any:
    """A tiny model and its decoder."""
    path = "transformers.models.glm5_next"
    config = importlib.import_module(f"{path}.configuration_glm5_next").Glm5NextConfig(
        text_config=dict(
            **SIZES,
            **eps,
            intermediate_size=16,
            num_key_value_heads=2,
            kv_lora_rank=8,
            v_head_dim=8,
            qk_nope_head_dim=8,
            linear_head_dim=8,
            linear_num_heads=2,
            index_kpool=2,
            pad_token_id=0,
            layer_types=["linear_attention", "indexed_attention"],
            mlp_layer_types=["dense", "sparse"],
            indexer_types=["full", "full"],
        ),
        vision_config=dict(
            depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=16
        ),
    )
    module = importlib.import_module(f"{path}.modeling_glm5_next")
    model = module.Glm5NextForConditionalGeneration(config)
    return model, model.model.language_model


MODELS: dict[str, Callable[..., Any]] = {"deepseek_v4": deepseek_v4, "glm_5_3": glm_5_3}


def seen(decoder: Any) -> dict[str, Any]:
    """What the sites, the head and the sublayers get and give in one forward pass, by name."""
    found: dict[str, Any] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: Any, given: tuple[Any, ...], made: Any) -> None:
            found[name] = (given[0] if given else None, made)

        return hook

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in decoder.named_modules()
        if name.endswith(("attn_hc", "ffn_hc", "hc_head", "self_attn", ".mlp"))
    ]
    with torch.no_grad():
        decoder(input_ids=torch.arange(24).view(2, 12) * 5 % 32, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def first(made: Any) -> Tensor:
    """A sublayer's output, which may be a tuple's first."""
    return made[0] if isinstance(made, tuple) else made


@pytest.mark.parametrize("eps", [{}, {"hc_eps": 1e-3, "rms_norm_eps": 1e-2}], ids=["", "other eps"])
@pytest.mark.parametrize("name", MODELS)
def test_every_site_of_a_saved_model_computes_what_transformers_does(
    name: str, eps: dict[str, float], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model, decoder = MODELS[name](**eps)
    for key, parameter in model.named_parameters():
        if "hc" in key:  # most start at zero
            torch.nn.init.normal_(parameter, std=0.5)
    model.eval().save_pretrained(tmp_path / "hf", max_shard_size="8KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    mhc, parameters = state_dict_of(tmp_path / "hf")
    given = {ours: eps[key] for ours, key in EPS.items() if key in eps}
    assert mhc.convention == name and mhc.overrides == given
    states = seen(decoder)
    checked = 0
    for layer in range(LAYERS):
        for site, ours, sublayer in (
            ("attn_hc", "attention_connection", "self_attn"),
            ("ffn_hc", "mlp_connection", "mlp"),
        ):
            x, (post, comb, collapsed) = states[f"layers.{layer}.{site}"]
            connection = HyperConnection(mhc, WIDTH, 0)
            key = f"decoder.layers.{layer}.{ours}."
            connection.load_state_dict(
                {k.removeprefix(key): v for k, v in parameters.items() if k.startswith(key)}
            )
            got = connection(x.flatten(-2))
            torch.testing.assert_close(got.u, collapsed, **EQUAL)
            torch.testing.assert_close(got.h_post, post, **EQUAL)
            torch.testing.assert_close(got.h_res, comb.mT, **EQUAL)
            f = first(states[f"layers.{layer}.{sublayer}"][1])
            y = kernels.combine(x, f, got.h_post, got.h_res)
            following = f"layers.{layer}.ffn_hc" if site == "attn_hc" else _next(layer)
            torch.testing.assert_close(y, states[following][0], **EQUAL)
            checked += 1
    assert checked == 4
    x, end = states["hc_head"]
    if mhc.learned_head:
        head = Head(mhc, WIDTH)
        key = f"decoder.layers.{LAYERS - 1}.head."
        head.load_state_dict(
            {k.removeprefix(key): v for k, v in parameters.items() if k.startswith(key)}
        )
        torch.testing.assert_close(head(x), end, **EQUAL)
    else:
        torch.testing.assert_close(x.mean(-2), end, **EQUAL)


def _next(layer: int) -> str:
    return f"layers.{layer + 1}.attn_hc" if layer + 1 < LAYERS else "hc_head"
