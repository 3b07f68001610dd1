"""HybridModel on a GPU: Megatron's own spec, in Transformer Engine's classes."""

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from megatron_mhc import MHCConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("megatron"),
]

SEQUENCE, BATCH, HIDDEN, VOCABULARY = 256, 2, 512, 128
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_ffn_hidden_size": 512,
    "moe_grouped_gemm": True,
}
LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_head_dim": 64,
    "qk_pos_emb_head_dim": 32,
    "v_head_dim": 64,
    "rope_type": "rope",
    "apply_rope_fusion": False,
}
# pattern, settings, the module that a layer wants
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "dense": ("*-*-", {}, "transformer_engine"),
    "experts": ("*E*E", EXPERTS, "transformer_engine"),
    "latent attention": ("+-+E", {**EXPERTS, **LATENT}, "transformer_engine"),
    # without the CUDA convolution, that of PyTorch
    "Mamba": ("M-*M", {"use_mamba_mem_eff_path": False}, "mamba_ssm.ops.triton.ssd_combined"),
    "gated delta net": (
        "G-*G",
        {
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
        },
        "fla.ops.gated_delta_rule",
    ),
}

PACKAGES = {
    "transformer_engine": "Transformer Engine: pip install .[te]",
    "mamba_ssm": "Mamba's kernels: pip install mamba-ssm",
    "fla": "its kernels: pip install flash-linear-attention",
}


def settings_of(layers: int, **more: Any) -> Any:
    """A TransformerConfig of the tiny model."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if "multi_latent_attention" in more else TransformerConfig
    return kind(
        **{
            "num_layers": layers,
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
        | more
    )


def seeded() -> None:
    """The same weights and tokens after every call."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)


def hybrid(case: str, mhc: MHCConfig | None, perturb: bool) -> Any:
    """A HybridModel on the GPU, with Megatron's own weights."""
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.module import Float16Module

    from megatron_mhc import with_mhc

    pattern, more, module = CASES[case]
    # Megatron has no such layer without it, and pip builds it with CUDA: no extra of ours has it
    package = PACKAGES[module.partition(".")[0]]
    pytest.importorskip(module, reason=f"{case} layers want {package}", exc_type=ImportError)
    config = settings_of(len(pattern), **more)
    seeded()
    core = HybridModel(
        config,
        with_mhc(hybrid_stack_spec, mhc) if mhc else hybrid_stack_spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    if perturb:
        move_from_the_start(core)
    return Float16Module(config, core.cuda())


@torch.no_grad()
def move_from_the_start(core: Any) -> None:
    """Away from where phi is zero and the streams are equal."""
    torch.manual_seed(2)
    for name, parameter in core.named_parameters():
        if "connection" in name:
            parameter += 0.05 * torch.randn(parameter.shape).to(parameter)


def trained(model: Any, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of steps of Adam on one batch, and the last gradients."""
    torch.manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1)).cuda()
    positions = torch.arange(SEQUENCE, device="cuda").expand(BATCH, -1)
    losses, gradients = [], {}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model.zero_grad()
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).float().mean()
        loss.backward()
        losses.append(loss.item())
        gradients = {k: p.grad.clone() for k, p in model.module.named_parameters()}
        optimizer.step()
    return losses, gradients


@pytest.mark.parametrize("case", CASES)
def test_it_starts_as_the_ordinary_model_and_trains(case: str) -> None:
    ordinary, _ = trained(hybrid(case, None, False), 1)
    wide, gradients = trained(hybrid(case, MHCConfig(backend="triton"), False), 8)
    # bf16 keeps 8 bits: each of four layers rounds its streams, whose mean the ordinary one rounds
    assert wide[0] == pytest.approx(ordinary[0], rel=1e-3)
    assert wide[-1] < wide[0] - 0.3
    ours = [name for name in gradients if "connection" in name]
    assert len(ours) == 3 * len(CASES[case][0])
    assert not [name for name in ours if gradients[name].norm() == 0]


@pytest.mark.parametrize("case", CASES)
def test_recompute_of_the_streams_is_exact(case: str) -> None:
    kept = trained(hybrid(case, MHCConfig(backend="triton"), True), 2)
    again = trained(hybrid(case, MHCConfig(backend="triton", recompute=2), True), 2)
    assert kept[0] == again[0]
    different = [name for name, value in kept[1].items() if not value.equal(again[1][name])]
    assert not different


def test_pairs_of_layers_are_a_gpt_bit_for_bit() -> None:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.module import Float16Module

    from megatron_mhc import with_mhc

    mhc = MHCConfig(backend="triton")
    config = settings_of(2)
    seeded()
    gpt = GPTModel(
        config,
        with_mhc(get_gpt_layer_with_transformer_engine_spec(), mhc),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    move_from_the_start(gpt)
    one, two = Float16Module(config, gpt.cuda()), hybrid("dense", mhc, True)

    def of_gpt(name: str) -> str:
        halved = re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) // 2}", name)
        return halved.replace("final_norm", "final_layernorm")

    weights = dict(gpt.named_parameters())
    with torch.no_grad():
        for name, parameter in two.module.named_parameters():
            parameter.copy_(weights[of_gpt(name)])
    losses, gradients = trained(one, 2)
    same, hybrids = trained(two, 2)
    assert same == losses
    assert {of_gpt(name) for name in hybrids} == gradients.keys()
    assert not [n for n, value in hybrids.items() if not value.equal(gradients[of_gpt(n)])]
