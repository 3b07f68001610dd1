"""Whole-layer offloading on a CPU: what Transformer Engine's context does, but for the copies.

Its contract: tensors that a layer saves go to that layer's list, and are there again from the
moment that its output has a gradient until the next layer's has.
"""

from typing import Any

import torch
from megatron.core.transformer import transformer_block
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Offloading:
    """A context around each layer's forward, in their order; `commit` runs behind each of them.

    Attributes:
        inside_context: not said: Megatron's local linears would ask for Transformer Engine.
        taken: how many tensors came back as others.
    """

    taken = 0
    inside_context = False

    def __init__(self, layers: int, model_layers: int) -> None:
        self.layers, self.model_layers = layers, model_layers
        self.forward_layer = self.backward_layer = -1
        self.hooks: list[saved_tensors_hooks] = []

    def __enter__(self) -> None:
        self.forward_layer = (self.forward_layer + 1) % self.model_layers
        self.hooks.append(saved_tensors_hooks(self.push, self.pop))
        self.hooks[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self.hooks.pop().__exit__(*error)

    def push(self, tensor: Tensor) -> Any:
        """A tensor is saved: with the layer that is running."""
        if isinstance(tensor, torch.nn.Parameter) or self.forward_layer >= self.layers:
            return tensor
        return self.forward_layer, tensor.clone()

    def pop(self, saved: Any) -> Tensor:
        """It is wanted again: only while its layer's turn is."""
        if isinstance(saved, Tensor):
            return saved
        layer, tensor = saved
        assert layer == self.backward_layer, f"layer {layer}'s, in {self.backward_layer}'s backward"
        Offloading.taken += 1
        return tensor

    def commit(self, output: Tensor) -> Tensor:
        """A layer's output: its gradient is where the layer's backward begins."""
        layer = self.forward_layer

        def begin(_: Any) -> None:
            self.backward_layer = layer

        assert output.grad_fn is not None
        output.grad_fn.register_prehook(begin)
        return output


def offload_on_cpu() -> None:
    """Let Megatron's Transformer blocks find this where Transformer Engine is missing."""

    def context(enabled: bool, layers: int, model_layers: int, *_: Any) -> tuple[Any, Any]:
        offloading = Offloading(layers if enabled else 0, model_layers)
        return offloading, offloading.commit

    transformer_block.get_cpu_offload_context = context
