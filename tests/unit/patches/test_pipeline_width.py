"""The shape that pipeline stages make room for, and what they refuse to send."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_mhc import MHCConfig
from megatron_mhc.model.config_marks import mark_streams, message_width, streams_of
from megatron_mhc.patches.pipeline_width import pipeline_width_patch


def communicate(config: Any, shape: tuple[int, ...], **sent: torch.Tensor | None) -> Any:
    """The shape that Megatron's own `_communicate` would be called with."""
    patched = pipeline_width_patch(message_width).replace(
        lambda self, *, tensor_shape, **_: tensor_shape
    )
    return patched(SimpleNamespace(config=config), tensor_shape=shape, **sent)


def config_with(
    mhc: MHCConfig | None, variable: bool = False, dtype: torch.dtype = torch.float32
) -> SimpleNamespace:
    """What is read of a TransformerConfig."""
    config = SimpleNamespace(variable_seq_lengths=variable, hidden_size=8, params_dtype=dtype)
    if mhc is not None:
        mark_streams(config, mhc)
    return config


def test_the_last_dimension_is_widened_for_mhc_alone() -> None:
    assert communicate(config_with(MHCConfig(num_streams=4)), (16, 2, 8)) == (16, 2, 32)
    assert communicate(config_with(MHCConfig(num_streams=1)), (16, 2, 8)) == (16, 2, 8)
    assert communicate(config_with(None), (16, 2, 8)) == (16, 2, 8)
    # H_pre of delayed sites behind the streams: a column each in fp32, three in 16 bits
    delayed = MHCConfig(convention="deepseek_v4_1")
    assert communicate(config_with(delayed), (16, 2, 8)) == (16, 2, 32 + 4)
    bf16 = config_with(delayed, dtype=torch.bfloat16)
    assert communicate(bf16, (16, 2, 8)) == (16, 2, 32 + 12)
    # nothing is received where there is no shape; stages tell each other theirs in the other case
    assert communicate(config_with(MHCConfig()), ()) == ()
    assert communicate(config_with(MHCConfig(), variable=True), (16, 2, 8)) == (16, 2, 8)


@pytest.mark.parametrize("name", ["tensor_send_next", "tensor_send_prev"])
def test_a_tensor_of_another_shape_is_not_sent(name: str) -> None:
    config = config_with(MHCConfig())
    communicate(config, (16, 2, 8), **{name: torch.empty(16, 2, 32)})
    # as many bytes, another shape: a backend would deliver it without a word
    with pytest.raises(ValueError, match=rf"{name} of shape \(32, 2, 16\).*expects \(16, 2, 32\)"):
        communicate(config, (16, 2, 8), **{name: torch.empty(32, 2, 16)})


def test_one_configuration_is_for_one_model() -> None:
    config = config_with(MHCConfig(num_streams=4))
    mark_streams(config, MHCConfig(num_streams=4, init="zero"))  # another layer, chunk or depth
    for other in (MHCConfig(num_streams=2), MHCConfig(overlap_p2p=True)):
        with pytest.raises(ValueError, match=r"\(4, 0\), this one .* its own TransformerConfig"):
            mark_streams(config, other)
    with pytest.raises(ValueError, match=r"one of the two has delayed sites: .* its own"):
        mark_streams(config, MHCConfig(convention="deepseek_v4_1"))
    assert streams_of(config) == 4
