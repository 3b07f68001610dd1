"""CUDA graphs of single layers: what Megatron captures of a layer with sites, and what it replays.

Graphs of whole layers, or of attention with a router, hold the sites in them. Graphs of attention
alone (`--cuda-graph-modules attn`) would hold half of mHC; here they hold the sublayer F and no
site. So the sites fuse, drop what they read, and log, as without graphs.
"""

from typing import Any

import torch
from megatron.core.transformer.cuda_graphs import is_graph_capturing
from megatron.core.transformer.module import GraphableMegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from .columns import extra_columns
from .compatibility import holds_attention_alone


class GraphedLayer(TransformerLayer):
    """A TransformerLayer whose CUDA graphs take n streams, or hold self-attention alone."""

    _bias: tuple[Tensor | None] = (None,)
    """Of self-attention's output, where its graph holds that alone: a parameter, no result of the
    graph. (In a tuple: the layer would take it for a parameter of its own.)"""

    def graph_attention_alone(self) -> None:
        """Let calls of self-attention replay its graph, once there is one."""
        self._attention = self.self_attention.forward
        self.self_attention.forward = self._attend

    def _attend(self, normed: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """norm(u) [s, b, C] -> f [s, b, C] and its bias: `self_attention.forward`, or its graph."""
        if is_graph_capturing() or not (self.training and self.cuda_graphs):
            return self._attention(normed, *args, **kwargs)
        (f,) = GraphableMegatronModule._te_cuda_graph_replay(self, normed, *args, **kwargs)
        return f, self._bias[0]

    def _forward_attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Megatron's; where it captures self-attention alone, that on norm(u) [s, b, C]."""
        if not (holds_attention_alone(self.config) and is_graph_capturing()):
            return super()._forward_attention(hidden_states, *args, **kwargs)
        f, bias = self.self_attention(hidden_states, *args, **kwargs)
        self._bias = (bias,)
        return f, None

    def _te_cuda_graph_replay(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's; where the graph is self-attention, the layer, which calls that."""
        if holds_attention_alone(self.config):
            return self.forward(*args, **kwargs)
        return super()._te_cuda_graph_replay(*args, **kwargs)

    def get_layer_static_inputs(self, seq_length: int, micro_batch_size: int) -> dict[str, Tensor]:
        """What Megatron captures with: n streams; one at the entry, and for attention alone.

        Behind attention that is not in the graph there are n streams at the entry too.
        """
        inputs = super().get_layer_static_inputs(seq_length, micro_batch_size)
        held = {module.name for module in self.config.cuda_graph_modules}
        takes_one = self.is_entry and (not held or "attn" in held)
        if not (takes_one or holds_attention_alone(self.config)):
            one = inputs["hidden_states"]
            wide = one.detach().repeat(1, 1, self.mhc.num_streams)
            if extra := extra_columns(self.mhc, one.dtype):
                wide = torch.nn.functional.pad(wide, (0, extra))
            inputs["hidden_states"] = wide.requires_grad_(one.requires_grad)
        return inputs

    def _get_submodules_under_cudagraphs(self) -> list[torch.nn.Module]:
        """Megatron's list, and the connections and head whose parameters its slots read.

        Parameters are gathered for what is on it.
        """
        if holds_attention_alone(self.config):
            return [self.self_attention]
        held = super()._get_submodules_under_cudagraphs()
        if held == [self]:
            return held
        if self.input_layernorm in held:
            held.append(self.attention_connection)
        if self.pre_mlp_layernorm in held:
            held.append(self.mlp_connection)
        if self.mlp in held and self.is_exit and self.mhc.learned_head:
            held.append(self.head)
        return held
