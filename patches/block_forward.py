"""Patches of TransformerBlock and HybridStack: a look at their layers before they run.

A layer cannot know that others were taken away, and what takes them (a tool for compression, a line
in a script) hands nobody else the list. Nor is there a layer to ask in a stage that has none.
"""

import functools
from collections.abc import Callable
from typing import Any

from .registry import Patch


def block_forward_patches(begin: Callable[[Any, Any], Any]) -> tuple[Patch, ...]:
    """`begin(block, inference_context)` runs before every forward of a TransformerBlock or a
    HybridStack, which have read nothing by then; the context is None while one trains. What it
    returns, unless that is None, is called with the output, and its result is the output."""

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            context = kwargs.get("inference_context") or kwargs.get("inference_params")
            finish = begin(self, context)
            output = original(self, *args, **kwargs)
            return output if finish is None else finish(output)

        return forward

    why = (
        "a model whose layers were dropped still enters and leaves the streams; a stage without"
        " layers has its links; and inference over pipeline stages is refused"
    )
    block = "megatron.core.transformer.transformer_block:TransformerBlock.forward"
    stack = "megatron.core.models.hybrid.hybrid_block:HybridStack.forward"
    return Patch("block-forward", block, replace, why), Patch("stack-forward", stack, replace, why)
