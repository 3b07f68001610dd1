"""What a layer's place in its block decides: entry, exit, fusion, recompute blocks.

Looked at in front of every forward, for a layer cannot know its neighbours when it is built, and
tools that make a built model shorter (or longer) hand nobody else the list of layers.
"""

from collections.abc import Sequence
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_mhc.costs.recompute_plan import blocks

from .bare_stages import Finish, message_as_it_is, one_stream_as_message, take_one_stream
from .config_marks import is_marked
from .inference import refuse_stages
from .layer import MHCLayer
from .recompute import Block

BLOCKS = (TransformerBlock, HybridStack)
"""What holds layers one behind the other."""


def begin(block: Any, inference_context: Any = None) -> Finish | None:
    """What runs in front of a block's forward: `arrange`, and what its links want.

    Returns:
        What its output becomes, for the link to the next stage; None where it stays as it is. The
        rest as for `arrange`.
    """
    arrange(block, inference_context)
    layers = list(block.layers)
    if layers and not isinstance(layers[0], MHCLayer):
        return None
    if layers:
        begins, ends = layers[0].is_entry, layers[-1].is_exit
    elif is_marked(block.config):
        begins, ends = block.post_process, block.pre_process
    else:
        return None
    if begins and not block.pre_process:
        take_one_stream(block)
    if block.post_process or (layers and not ends):
        return None
    return one_stream_as_message(block) if ends else message_as_it_is(block)


def arrange(block: Any, inference_context: Any = None) -> None:
    """Give the layers of a block the places that they have now; most often they do.

    Args:
        block: a TransformerBlock or HybridStack; one without mHC stays as it is.
        inference_context: what Megatron's inference gives the forward that comes next.

    Raises:
        ValueError: the model ends with a learned head, and its last layer has none; or inference
            over several pipeline stages, which exchange one stream there. A stage says so before it
            reads what the one before should have sent.
    """
    layers = list(block.layers)
    if not layers or not all(isinstance(layer, MHCLayer) for layer in layers):
        return
    if inference_context is not None:
        refuse_stages(layers[0])
    for layer in layers:
        # a chunk in the middle of a pipeline begins and ends with streams
        is_entry = layer is layers[0] and (block.pre_process or layer.is_entry)
        is_exit = layer is layers[-1] and (block.post_process or layer.is_exit)
        layer.set_place(is_entry=is_entry, is_exit=is_exit)
        layer.forget()  # a forward that ended between two layers
    last = layers[-1]
    if last.is_exit and last.mhc.learned_head and not hasattr(last, "head"):
        raise ValueError(
            f"the last layer (layer_number {last.layer_number}) has no learned head, with which"
            " this model ends: it stood in the layer that was last when the model was built. Keep"
            " that layer, or hand its head on before you drop it: layers[-1].head = dropped.head"
        )
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        fused = after if layer.fuses_with_next else None
        layer.sites[-1].following = fused.sites[0] if fused is not None else None
    if (plan := layers[0].recompute_plan) is not None:
        for members in blocks(len(layers), plan.layers):
            _drop_together(layers[members.start : members.stop])


def _drop_together(layers: Sequence[MHCLayer]) -> None:
    """Put these layers into one recompute block, unless they are one."""
    sites = tuple(site for layer in layers for site in layer.sites)
    if sites[0].block is None or sites[0].block.sites != sites:
        block = Block(sites, layers[0].mhc.backend)
        for site in sites:
            site.block = block
