"""A patch of AbstractModelInferenceWrapper: a look at the model that an engine is to run.

A stage behind the first waits for what it reads before its model runs, so a refusal of the first
stage's forward would leave it waiting.
"""

import functools
from collections.abc import Callable
from typing import Any

from .registry import Patch


def inference_wrapper_patch(check: Callable[[Any], None]) -> Patch:
    """`check(model)` runs before an inference wrapper is built around a model."""

    def replace(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def __init__(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
            check(model)
            original(self, model, *args, **kwargs)

        return __init__

    package = "megatron.core.inference.model_inference_wrappers"
    target = f"{package}.abstract_model_inference_wrapper:AbstractModelInferenceWrapper.__init__"
    why = "inference over pipeline stages is refused on every stage when its engine is built"
    return Patch("inference-wrapper", target, replace, why)
