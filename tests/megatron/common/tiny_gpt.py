"""One process of the tests of `convert`: a tiny GPT of one kind, loaded, saved, and its logits.

python -m tests.megatron.common.tiny_gpt SCENARIOS_AS_JSON RESULT_FILE

The kinds are an `ordinary` model, one with `ours`, and one with Megatron's own mHC (`native`), if
this Megatron has it. `python -m tests.megatron.common.tiny_gpt record NAME` records the last.
"""

import dataclasses
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import HashStore

from tests.megatron.common import models  # isort: skip  (first: Megatron, for the CPU)

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt import gpt_layer_specs as specs
from megatron.core.transformer import TransformerConfig

from megatron_mhc import MHCConfig, with_mhc
from megatron_mhc.tools.safetensors_files import SINGLE, write_file
from tests.megatron.common.native_records import EPSILON, ITERATIONS, RECORDS, record
from tests.megatron.common.worker import work

LAYERS, WIDTH, VOCABULARY, TOKENS = 2, 8, 16, 6
SITES = ("connection", "hc_head")
"""In the names of the sites' parameters: they start a normal distribution's unit from zero."""


def _config(kind: str) -> TransformerConfig:
    native: dict[str, Any] = {}
    if kind == "native":
        names = {field.name for field in dataclasses.fields(TransformerConfig)}
        of_dev = "enable_hyper_connections" in names
        native = {"enable_hyper_connections" if of_dev else "enable_mhc_connections": True}
        native["mhc_sinkhorn_iterations"] = ITERATIONS
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=2,
        ffn_hidden_size=2 * WIDTH,
        layernorm_epsilon=EPSILON,
        normalization="RMSNorm",
        add_bias_linear=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **native,
    )


def _native_spec(config: TransformerConfig) -> Any:
    if hasattr(config, "enable_hyper_connections"):  # dev
        return specs.get_gpt_layer_local_spec(normalization="RMSNorm", enable_hyper_connection=True)
    from megatron.core.transformer.hyper_connection import HyperConnectionModule
    from megatron.core.transformer.transformer_layer import HyperConnectionTransformerLayer

    spec = specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.module = HyperConnectionTransformerLayer  # no spec of Megatron's builds it yet
    spec.submodules.self_attention_hyper_connection = HyperConnectionModule
    spec.submodules.mlp_hyper_connection = HyperConnectionModule
    return spec


def _build(kind: str, mhc: dict[str, Any] | None) -> GPTModel:
    models.model_parallel_cuda_manual_seed(7)
    config = _config(kind)
    if kind == "native":
        spec = _native_spec(config)
    else:
        spec = specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    if kind == "ours":
        spec = with_mhc(spec, MHCConfig(**(mhc or {})))
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=TOKENS,
        position_embedding_type="rope",
    )
    generator = torch.Generator().manual_seed(11)
    for name, parameter in sorted(model.named_parameters()):
        scale = 1.0 if any(part in name for part in SITES) else 0.5
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def native_items(tensors: dict[str, Tensor], apart: bool) -> dict[str, ShardedTensor]:
    """The recorded tensors of native mHC as a model of it saves them."""
    own = {k: v for k, v in tensors.items() if "hyper_connection." in k or "hc_head" in k}
    found = {}
    for key, value in own.items():
        head, _, rest = key.partition("layers.")
        layer, _, name = rest.partition(".")
        stacked = bool(rest) and not apart
        place = f"{head}layers.{name}" if stacked else key
        offsets = [(0, int(layer), LAYERS)] if stacked else []
        found[key] = ShardedTensor.from_rank_offsets(
            place, value, *offsets, prepend_axis_num=len(offsets)
        )
    return found


def _logits(model: GPTModel) -> Tensor:
    tokens = torch.arange(2 * TOKENS).view(2, TOKENS) * 5 % VOCABULARY
    positions = torch.arange(TOKENS).expand(2, TOKENS)
    return model(tokens, positions, None).clone()


@torch.no_grad()
def run(s: dict[str, Any]) -> dict[str, Any]:
    """Build, load, save.

    Args:
        s: `kind`; `mhc`, the settings of `ours`; `dtype` of a native model's parameters; `record`,
            the recorded model whose weights it gets, and whose native mHC is saved beside; `load`
            and `save`, folders; `args`, Megatron's to save; `apart`, whether every layer has keys
            of its own; `moved`, to have other weights before they are loaded.

    Returns:
        logits [2, TOKENS, VOCABULARY].
    """
    parallel_state.initialize_model_parallel()
    model = _build(s["kind"], s.get("mhc"))
    tensors = record(s["record"]) if "record" in s else {}
    for shard in models.whole_model_shards(model) if tensors else ():
        shard.data.copy_(tensors[shard.key])
    for parameter in model.parameters() if s.get("moved") else ():
        parameter.data += 1
    model.to(getattr(torch, s.get("dtype", "float32")))
    metadata = {"non_homogeneous_layers": True} if s.get("apart") else None
    state = model.sharded_state_dict(metadata=metadata)
    if "load" in s:
        model.load_state_dict(dist_checkpointing.load({"model": state}, s["load"])["model"])
    if "save" in s:
        kind = getattr(torch, s.get("dtype", "float32"))
        state |= native_items({k: v.to(kind) for k, v in tensors.items()}, bool(s.get("apart")))
        common = {"iteration": 3} | ({"args": Namespace(**s["args"])} if "args" in s else {})
        Path(s["save"]).mkdir(parents=True)
        dist_checkpointing.save({"model": state, **common}, s["save"])
    logits = _logits(model.float())
    parallel_state.destroy_model_parallel()
    return {"logits": logits}


@torch.no_grad()
def write_record(name: str) -> None:
    """Record the native model of the Megatron that is imported."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model = _build("native", None)
    tensors = {shard.key: shard.data.detach() for shard in models.whole_model_shards(model)}
    (RECORDS / name).mkdir(parents=True, exist_ok=True)
    write_file(RECORDS / name / SINGLE, tensors | {"logits": _logits(model)})


if __name__ == "__main__":
    if sys.argv[1] == "record":
        write_record(sys.argv[2])
    else:
        work(run)
