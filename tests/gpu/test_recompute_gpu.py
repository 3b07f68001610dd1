"""Selective recompute on a GPU: the rebuild's bits, and models of Transformer Engine's spec."""

import gc
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from megatron_mhc import MHCConfig
from tests.gpu_memory import requested_bytes
from tests.kernel_cases import check_rebuild

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("tokens", "n", "width", "sites"),
    [(1000, 4, 4096, 8), (127, 4, 7168, 4), (33, 4, 1111, 3), (8191, 4, 1280, 2), (70, 8, 520, 6)],
)
def test_rebuild_equals_the_forward_to_the_bit(tokens: int, n: int, width: int, sites: int) -> None:
    check_rebuild(tokens, n, width, sites, torch.bfloat16, "cuda")


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rebuild_in_other_dtypes(n: int, dtype: torch.dtype) -> None:
    check_rebuild(130, n, 1280, 5, dtype, "cuda")


SEQUENCE, BATCH, HIDDEN, LAYERS, VOCABULARY = 256, 2, 512, 5, 128


KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "delayed sites": {"mhc": {"convention": "deepseek_v4_1"}},
    "dropout": {"hidden_dropout": 0.1},
    "mlp recomputed": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "core_attn recomputed": {"recompute_granularity": "selective"},
    "fp8": {"fp8": "hybrid", "fp8_recipe": "delayed"},
    "moe": {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_token_dispatcher_type": "alltoall",
        "moe_ffn_hidden_size": 512,
        "moe_grouped_gemm": True,
    },
    # what examples/moe/cluster.sh turns on
    "latent attention, moe": {
        "multi_latent_attention": True,
        "q_lora_rank": None,
        "kv_lora_rank": 128,
        "qk_head_dim": 64,
        "qk_pos_emb_head_dim": 32,
        "v_head_dim": 64,
        "rope_type": "rope",
        "apply_rope_fusion": False,
        "num_moe_experts": 6,
        "moe_router_topk": 2,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-4,
        "moe_token_dispatcher_type": "alltoall",
        "moe_ffn_hidden_size": 512,
        "moe_shared_expert_intermediate_size": 512,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
    },
}


def built(kind: str, recompute: int | str | None) -> Any:
    """A model with Transformer Engine's layers on the GPU, away from mHC's start."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig
    from megatron.core.transformer.module import Float16Module

    from megatron_mhc import with_mhc

    settings = dict(KINDS[kind])
    mhc = MHCConfig(backend="triton", recompute=recompute, **settings.pop("mhc", {}))
    latent = settings.get("multi_latent_attention", False)
    config = (MLATransformerConfig if latent else TransformerConfig)(
        **{
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 1024,
            "num_attention_heads": 8,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "bf16": True,
            "params_dtype": torch.bfloat16,
            "gradient_accumulation_fusion": False,
            "deterministic_mode": True,
        }
        | settings
    )
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    spec = get_gpt_layer_with_transformer_engine_spec(
        config.num_moe_experts,
        settings.get("moe_grouped_gemm", False),
        multi_latent_attention=latent,
    )
    core = GPTModel(
        config,
        with_mhc(spec, mhc),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )
    with torch.no_grad():  # away from the start, where phi is zero and the streams are equal
        for name, parameter in core.named_parameters():
            if "connection" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    return Float16Module(config, core.cuda())


def trained(kind: str, recompute: int | str | None) -> dict[str, Any]:
    """A step of two accumulated microbatches, both in flight, an evaluation and half a step more.

    Losses, gradients, updated parameters, and the bytes that the two microbatches hold.
    """
    model = built(kind, recompute)
    positions = torch.arange(SEQUENCE, device="cuda").expand(BATCH, -1)

    def forward() -> torch.Tensor:
        tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), device="cuda")
        return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).float().mean()

    forward().backward()  # gradients exist, workspaces are allocated
    for parameter in model.parameters():
        parameter.grad = None
    gc.collect()  # what Megatron and Transformer Engine leave in cycles must not go in between
    before = requested_bytes()
    losses = [forward(), forward()]
    gc.collect()
    held = requested_bytes() - before
    for loss in losses:
        loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval()
    with torch.no_grad():
        losses.append(forward())
    model.train()
    losses.append(forward())
    losses[-1].backward()
    return {
        "norms": norms(model),
        "losses": [loss.item() for loss in losses],
        "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        "parameters": {name: p.detach() for name, p in model.named_parameters()},
        "held": held,
    }


def norms(model: Any) -> int:
    """Norms that are modules of their own; Transformer Engine has the others in its linears."""
    from megatron.core.transformer.identity_op import IdentityOp

    slots = [(m.input_layernorm, m.pre_mlp_layernorm) for m in model.module.decoder.layers]
    return sum(not isinstance(norm, IdentityOp) for pair in slots for norm in pair)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_trains_bit_for_bit_in_less_memory(kind: str) -> None:
    whole, again = trained(kind, None), trained(kind, None)
    for recompute in (2, "auto"):
        got = trained(kind, recompute)
        assert got["losses"] == whole["losses"]
        assert got["gradients"].keys() == whole["gradients"].keys()
        for name, gradient in got["gradients"].items():
            # what differs between two equal runs says nothing of recompute
            assert torch.equal(whole["gradients"][name], again["gradients"][name]), (
                f"{name} is not deterministic here"
            )
            assert torch.equal(gradient, whole["gradients"][name]), f"{name}, {recompute}"
        for name, parameter in got["parameters"].items():
            assert torch.equal(parameter, whole["parameters"][name]), f"{name}, {recompute}"
        if recompute == 2:  # blocks of 2, 2 and 1 layers, two microbatches
            stream = 2 * HIDDEN * SEQUENCE * BATCH
            fewer = 2 * stream * (4 * (3 + 3 + 1) + 2 * LAYERS + whole["norms"])
            h_pre = 2 * 2 * LAYERS * 4 * 4 * SEQUENCE * BATCH
            # half of one u: no tensor of a stream's size is left over or missing
            assert abs(whole["held"] - got["held"] - fewer + h_pre) < stream / 2
