"""A scenario's HybridModel: tiny, of Megatron's own spec without Transformer Engine.

Import it behind `models`, which readies Megatron for the CPU.
"""

import copy
import re
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid import hybrid_layer_specs
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_mhc.costs.sites import segments_of
from tests.megatron.common.scenario import SEQUENCE, VOCABULARY, Scenario


class OwnMixer(torch.nn.Module):
    """What stands where Mamba's mixer or a gated delta net would, whose packages want a GPU.

    It is built and called as Megatron builds and calls either. A position gets the mean of those
    before it, through a matrix.
    """

    def __init__(self, config: TransformerConfig, *, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(config.hidden_size, config.hidden_size))

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """[s, b, C] -> [s, b, C] and no bias."""
        positions = torch.arange(1, len(hidden_states) + 1).view(-1, 1, 1)
        return torch.nn.functional.linear(hidden_states.cumsum(0) / positions, self.weight), None


def layers_in(pattern: str) -> int:
    """How many layers the decoder of a pattern has."""
    return sum(segments_of(pattern))


def stack_spec() -> Any:
    """Megatron's spec, with `OwnMixer` where it needs packages that a CPU does not have."""
    spec = copy.copy(hybrid_layer_specs.hybrid_stack_spec)
    spec.submodules = copy.copy(spec.submodules)
    for kind, slot in (("mamba_layer", "mixer"), ("gdn_layer", "self_attention")):
        layer = copy.copy(getattr(spec.submodules, kind))
        layer.submodules = copy.copy(layer.submodules)
        setattr(layer.submodules, slot, OwnMixer)
        setattr(spec.submodules, kind, layer)
    return spec


def build(s: Scenario, config: TransformerConfig, spec: Any, chunk: int | None) -> HybridModel:
    """One chunk of the model."""
    return HybridModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        hybrid_layer_pattern=s.pattern,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=s.tied,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        vp_stage=chunk,
    )


def gpt_key(key: str) -> str:
    """A checkpoint key of a HybridModel as the GPT's that has its layers two by two in one."""

    def halve(found: re.Match[str]) -> str:
        return f"decoder.layers.{int(found[1]) // 2}."

    key = re.sub(r"decoder\.layers\.(\d+)\.", halve, key)
    key = re.sub(r"mtp_model_layer\.layers\.\d+\.", "transformer_layer.", key)
    return key.replace("decoder.final_norm.", "decoder.final_layernorm.")
