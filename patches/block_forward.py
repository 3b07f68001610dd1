"""A patch of TransformerBlock: a look at its layers before they run.

A layer cannot know that others were taken away, and what takes them (a tool for compression, a line
in a script) hands nobody else the list.
"""

import functools
from collections.abc import Callable
from typing import Any

from .registry import Patch


def block_forward_patch(arrange: Callable[[Any], None]) -> Patch:
    """`arrange(block)` runs before every forward of a TransformerBlock."""

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            arrange(self)
            return original(self, *args, **kwargs)

        return forward

    return Patch(
        id="block-forward",
        target="megatron.core.transformer.transformer_block:TransformerBlock.forward",
        replace=replace,
        why="a model whose layers were dropped still enters and leaves the streams",
    )
