"""Patches of TransformerBlock and HybridStack: a look at their layers before they run.

A layer cannot know that others were taken away, and what takes them (a tool for compression, a line
in a script) hands nobody else the list.
"""

import functools
from collections.abc import Callable
from typing import Any

from .registry import Patch


def block_forward_patches(arrange: Callable[[Any], None]) -> tuple[Patch, ...]:
    """`arrange(block)` runs before every forward of a TransformerBlock or a HybridStack."""

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            arrange(self)
            return original(self, *args, **kwargs)

        return forward

    why = "a model whose layers were dropped still enters and leaves the streams"
    block = "megatron.core.transformer.transformer_block:TransformerBlock.forward"
    stack = "megatron.core.models.hybrid.hybrid_block:HybridStack.forward"
    return Patch("block-forward", block, replace, why), Patch("stack-forward", stack, replace, why)
