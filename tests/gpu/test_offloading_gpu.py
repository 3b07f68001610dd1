"""Offloading on a GPU, with Transformer Engine: mHC trains to the bit as it does without.

Of modules inside a sublayer (`--fine-grained-activation-offloading`), also beside selective
recompute of the streams, and of whole layers (`--cpu-offloading-num-layers`).
"""

import functools
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from megatron_mhc import MHCConfig
from tests.gpu_memory import requested_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("megatron"),
]

SEQUENCE, BATCH, HIDDEN, LAYERS, VOCABULARY = 256, 2, 512, 5, 128
STEPS, MICROBATCHES = 3, 2
MOE: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_ffn_hidden_size": 512,
    "moe_grouped_gemm": True,
}
KINDS: dict[str, dict[str, Any]] = {"dense": {}, "moe": MOE}
ATTENTION = ("core_attn", "attn_proj", "qkv_linear")
MODULES = {"dense": ATTENTION, "moe": (*ATTENTION, "expert_fc1", "moe_act")}
WHOLE_LAYERS = 2


def build(kind: str, recompute: int | None, more: dict[str, Any], across: bool = True) -> Any:
    """A model in bf16 on the GPU, seeded, away from the start of training.

    Without `across`, no site computes the input of the next layer's first one.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    from megatron_mhc import with_mhc

    settings = {
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
    config = TransformerConfig(**(settings | KINDS[kind] | more))
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    spec = get_gpt_layer_with_transformer_engine_spec(
        config.num_moe_experts, config.moe_grouped_gemm
    )
    core = GPTModel(
        config,
        with_mhc(spec, MHCConfig(backend="triton", recompute=recompute)),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            if "connection" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    for layer in core.decoder.layers:
        layer.fuses_with_next = layer.fuses_with_next and across
    return Float16Module(config, core.cuda())


def batches(step: int) -> Iterator[torch.Tensor]:
    """A step's microbatches of tokens [BATCH, SEQUENCE + 1]."""
    generator = torch.Generator().manual_seed(step)
    for _ in range(MICROBATCHES):
        shape = (BATCH, SEQUENCE + 1)
        yield torch.randint(0, VOCABULARY, shape, generator=generator).cuda()


def forward_step(iterator: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    """Megatron's forward_step: the mean loss of a microbatch."""
    tokens = next(iterator)
    positions = torch.arange(SEQUENCE, device="cuda").expand(BATCH, -1)

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = output.float().mean()
        return mean, {"loss": mean.detach().clone()}

    return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]), loss


def trained(
    kind: str, recompute: int | None = None, *, across: bool = True, **more: Any
) -> dict[str, Any]:
    """Some steps by Megatron's schedule: losses, the last step's gradients, parameters."""
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining

    model = build(kind, recompute, more, across)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        reduced = forward_backward_no_pipelining(
            forward_step_func=forward_step,
            data_iterator=batches(step),
            model=model,
            num_microbatches=MICROBATCHES,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
        )
        losses += [entry["loss"].item() for entry in reduced]
        optimizer.step()
    return {
        "losses": losses,
        "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        "parameters": {name: p.detach() for name, p in model.named_parameters()},
    }


@functools.cache
def whole(kind: str, across: bool = True) -> dict[str, Any]:
    """Without offloading; what differs between two equal runs would say nothing of it."""
    once, again = trained(kind, across=across), trained(kind, across=across)
    assert_same(once, again)
    assert once["losses"][-1] != once["losses"][0]
    return once


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Bit for bit."""
    assert got["losses"] == want["losses"]
    for what in ("gradients", "parameters"):
        assert got[what].keys() == want[what].keys()
        for name, value in want[what].items():
            assert torch.equal(got[what][name], value), f"{what} of {name}"


@pytest.mark.parametrize("recompute", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_modules_inside_a_sublayer_are_offloaded(kind: str, recompute: int | None) -> None:
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
        PipelineOffloadManager,
    )

    PipelineOffloadManager.reset_instance()
    got = trained(
        kind,
        recompute,
        fine_grained_activation_offloading=True,
        offload_modules=list(MODULES[kind]),
        min_offloaded_tensor_size=1024,
    )
    offloaded = PipelineOffloadManager.get_instance().offload_summary_bytes
    assert set(offloaded) == set(MODULES[kind]) and all(offloaded.values())
    assert_same(got, whole(kind))


WHOLE = {"cpu_offloading": True, "cpu_offloading_num_layers": WHOLE_LAYERS}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_layers_are_offloaded(kind: str) -> None:
    """Layers are not fused then: a boundary that is not fused rounds once more."""
    assert_same(trained(kind, **WHOLE), whole(kind, across=False))


def held(more: dict[str, Any]) -> tuple[int, float]:
    """Bytes on the GPU that a forward leaves for its backward, and MiB that it has offloaded."""
    model = build("dense", None, more)
    for _ in range(2):  # in the first, gradients and workspaces are allocated too
        gc.collect()
        before = requested_bytes()
        output, loss = forward_step(batches(0), model)
        mean = loss(output)[0]
        del output, loss
        torch.cuda.synchronize()
        gc.collect()
        bytes_held = requested_bytes() - before
        context = model.module.decoder.offload_context
        synchronizer = getattr(context, "offload_synchronizer", None)
        offloaded = synchronizer.get_offloaded_total_size_mb() if synchronizer else 0.0
        mean.backward()
    return bytes_held, offloaded


def test_whole_layers_give_their_memory_back() -> None:
    (on_gpu, none), (left, offloaded) = held({}), held(WHOLE)
    streams = 4 * 2 * HIDDEN * SEQUENCE * BATCH  # bytes of four streams
    # two sites a layer have saved their streams, beside what the sublayers save
    assert on_gpu - left > 2 * WHOLE_LAYERS * streams
    assert none == 0.0 and offloaded * 2**20 > 2 * WHOLE_LAYERS * streams
