"""For one step, the ends of model chunks work on side streams."""

import contextlib
from collections.abc import Iterator

import torch

from megatron_mhc.model.arrange import BLOCKS, arrange
from megatron_mhc.model.bare_stages import set_side_streams
from megatron_mhc.model.layer import MHCLayer
from megatron_mhc.model.site import INLINE, Inline

from .side_streams import SideStreams


def set_stage_ends(chunk: torch.nn.Module, side_streams: Inline) -> None:
    """Where the first and the last site of a model chunk work on the streams, and where a message
    of one stream is read and made.

    The first site of the model reads the embedding and the last one feeds the head: both of them
    have no link, and stay on the compute stream.
    """
    for module in chunk.modules():
        if isinstance(module, BLOCKS):
            set_side_streams(module, side_streams)
            arrange(module)  # before it is asked which layers are the ends
    layers = [m for m in chunk.modules() if isinstance(m, MHCLayer) and not m.is_mtp]
    if layers and not layers[0].is_entry:
        layers[0].sites[0].side_streams = side_streams
    if layers and not layers[-1].is_exit:
        layers[-1].sites[-1].side_streams = side_streams


@contextlib.contextmanager
def ends_on_side_streams(
    chunks: list[torch.nn.Module], side_streams: SideStreams
) -> Iterator[None]:
    """For one step, the ends of these model chunks work beside the compute stream."""
    for chunk in chunks:
        set_stage_ends(chunk, side_streams)
    side_streams.begin()
    try:
        yield
    finally:
        side_streams.end()
        for chunk in chunks:
            set_stage_ends(chunk, INLINE)
