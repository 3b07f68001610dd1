"""Packed sequences (THD) with Transformer Engine: mHC sees [tokens, 1, n*C], and a token is alone.

Sequences of one row that attention keeps apart train as each of them does in a row of its own.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from megatron_mhc import MHCConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("megatron"),
]

LENGTHS = (100, 60, 96)
HIDDEN, LAYERS, VOCABULARY = 512, 4, 128
BF16_ROUNDING = 5e-2
"""2**-9 an element, some roundings a layer, and weight gradients of three sums instead of one."""


def build(recompute: int | None = None) -> Any:
    """A model in bf16 on the GPU, seeded, away from the start of training."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    from megatron_mhc import with_mhc

    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=1024,
        num_attention_heads=8,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
        deterministic_mode=True,
    )
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    core = GPTModel(
        config,
        with_mhc(
            get_gpt_layer_with_transformer_engine_spec(),
            MHCConfig(backend="triton", recompute=recompute),
        ),
        vocab_size=VOCABULARY,
        max_sequence_length=sum(LENGTHS),
        position_embedding_type="rope",
    )
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            if "connection" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    return Float16Module(config, core.cuda())


def rows() -> list[Tensor]:
    """A sequence of tokens [length + 1] of each length."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(0, VOCABULARY, (length + 1,), generator=generator).cuda()
        for length in LENGTHS
    ]


def logits_of(model: Any, tokens: Tensor, lengths: tuple[int, ...], packed: bool) -> Tensor:
    """Logits [tokens, VOCABULARY] of sequences of these lengths, one behind the other."""
    from megatron.core.packed_seq_params import PackedSeqParams

    positions = torch.cat([torch.arange(length, device="cuda") for length in lengths])
    packing = None
    if packed:
        ends = torch.tensor((0, *lengths), device="cuda").cumsum(0, dtype=torch.int32)
        packing = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
        )
    return model(tokens[None], positions[None], None, packed_seq_params=packing)[0]


def trained(model: Any, batches: list[tuple[tuple[int, ...], list[Tensor]]], packed: bool) -> Any:
    """Logits of all tokens, and the gradients of mHC's parameters and of all others, flat."""
    every = []
    for lengths, sequences in batches:
        logits = logits_of(model, torch.cat([row[:-1] for row in sequences]), lengths, packed)
        labels = torch.cat([row[1:] for row in sequences])
        torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum").backward()
        every.append(logits.detach().float())
    found: dict[str, Tensor] = {"logits": torch.cat(every).flatten()}
    for part in ("mHC", "others"):
        found[part] = torch.cat(
            [
                parameter.grad.float().flatten()
                for name, parameter in model.named_parameters()
                if ("connection" in name) == (part == "mHC")
            ]
        )
    return found


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||."""
    return ((got - want).norm() / want.norm()).item()


def test_packed_sequences_train_as_sequences_of_their_own() -> None:
    sequences = rows()
    apart = [((len(row) - 1,), [row]) for row in sequences]
    alone = trained(build(), apart, packed=False)
    packed = trained(build(), [(LENGTHS, sequences)], packed=True)
    as_one = trained(build(), [((sum(LENGTHS),), sequences)], packed=False)
    for part, want in alone.items():
        assert error(packed[part], want) < BF16_ROUNDING, part
        # what attention would make of them, if they were not kept apart
        assert error(as_one[part], want) > 10 * BF16_ROUNDING, part


def test_recompute_of_the_streams_changes_no_bit_of_packed_sequences() -> None:
    batch = [(LENGTHS, rows())]
    kept, again = (trained(build(), batch, packed=True) for _ in range(2))
    dropped = trained(build(recompute=2), batch, packed=True)
    for part, want in kept.items():
        assert torch.equal(again[part], want), f"{part}: it is not deterministic here"
        assert torch.equal(dropped[part], want), part
