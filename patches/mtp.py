"""A patch of GPTModel: its multi-token prediction is built of the decoder's kind of layer.

Megatron's scripts and builders take the MTP layer's spec anew from their own defaults, whatever
`--spec` names; where they hand both specs to the model is the one place for all of them.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from .registry import Patch


def mtp_patch(like: Callable[[Any, Any], Any]) -> Patch:
    """`like(decoder_spec, mtp_spec)` returns the spec of multi-token prediction to build."""

    def replace(original: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            given = signature.bind(self, *args, **kwargs).arguments
            mtp = given.get("mtp_block_spec")
            if mtp is not None:
                given["mtp_block_spec"] = like(given["transformer_layer_spec"], mtp)
            bound = inspect.BoundArguments(signature, given)
            original(*bound.args, **bound.kwargs)

        return init

    return Patch(
        id="mtp",
        target="megatron.core.models.gpt.gpt_model:GPTModel.__init__",
        replace=replace,
        why="multi-token prediction gets the decoder's mHC",
    )
