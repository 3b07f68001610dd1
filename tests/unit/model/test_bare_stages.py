"""Pipeline stages without layers: what they do to a message, and on which streams.

In CPU processes a CUDA stream is a name alone, so no training there shows that a message of one
stream is read and made beside the compute stream. That it is handed there is shown here.
"""

from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_mhc import MHCConfig
from megatron_mhc.model.arrange import begin
from megatron_mhc.model.config_marks import mark_streams
from megatron_mhc.model.site import INLINE, Inline
from megatron_mhc.pipeline.stage_ends import set_stage_ends

N, C = 4, 8


class Recorded(Inline):
    """Does the work at once, and notes which kind it was."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def run_detached(self, work: Any, *inputs: Any) -> Any:
        self.asked.append("detached")
        return work(*inputs)

    def run_and_join(self, work: Any, streams: Tensor) -> Any:
        self.asked.append("joined")
        return work(streams)


def block_of(embedding: bool, loss: bool) -> Any:
    """Megatron's block as a stage without layers has it."""
    config = TransformerConfig(num_layers=2, hidden_size=C, num_attention_heads=2)
    mark_streams(config, MHCConfig(num_streams=N, overlap_p2p=True))
    block = TransformerBlock.__new__(TransformerBlock)
    torch.nn.Module.__init__(block)
    block.config, block.layers = config, torch.nn.ModuleList()
    block.pre_process, block.post_process = embedding, loss
    return block


@pytest.mark.parametrize(
    ("embedding", "loss", "comes", "goes", "asked"),
    [
        (True, False, C, N * C, ["detached"]),
        (False, True, N * C, C, ["joined"]),
        (False, False, N * C, N * C, ["detached"]),
    ],
    ids=["the embedding", "the loss", "neither"],
)
def test_a_message_is_read_and_made_on_the_side_streams(
    embedding: bool, loss: bool, comes: int, goes: int, asked: list[str]
) -> None:
    block, recorded = block_of(embedding, loss), Recorded()
    given = torch.randn(3, 2, comes)
    block.input_tensor = None if embedding else given
    for side_streams, wanted in ((recorded, asked), (INLINE, [])):
        recorded.asked.clear()
        set_stage_ends(block, side_streams)
        if not embedding:
            block.input_tensor = given
        finish = begin(block)
        inside = given if embedding else block.input_tensor
        out = inside if finish is None else finish(inside)
        assert out.shape == (3, 2, goes) and recorded.asked == wanted
        assert torch.equal(out[..., :C], given[..., :C])
        assert not embedding or not out[..., C:].any()
