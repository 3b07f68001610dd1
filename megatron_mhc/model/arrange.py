"""Entry, exit, links and recompute blocks of the layers that a Transformer block has now.

A layer knows its place from when it was built. Tools that make a model shorter (or longer) put
other layers into the list of a built one: what hangs on a layer's place is set anew then.
"""

from collections.abc import Sequence
from typing import Any

from .layer import MHCLayer
from .recompute import Block


def arrange(block: Any) -> None:
    """Give the layers of a TransformerBlock the places that they have now; most often they do.

    Args:
        block: a TransformerBlock; one without mHC stays as it is.

    Raises:
        ValueError: the model ends with a learned head, and its last layer has none.
    """
    layers = list(block.layers)
    if not layers or not all(isinstance(layer, MHCLayer) for layer in layers):
        return
    for layer in layers:
        # a chunk in the middle of a pipeline begins and ends with streams
        entry = layer is layers[0] and (block.pre_process or layer.is_entry)
        leaves = layer is layers[-1] and (block.post_process or layer.is_exit)
        if (entry, leaves) != (layer.is_entry, layer.is_exit):
            layer.is_entry, layer.is_exit = entry, leaves
    last = layers[-1]
    if last.is_exit and last.mhc.learned_head and not hasattr(last, "head"):
        raise ValueError(
            f"the last layer (layer_number {last.layer_number}) has no learned head, with which a"
            " model of convention deepseek_v4 ends: it stood in the layer that was last when the"
            " model was built. Keep that layer, or hand its head on before you drop it:"
            " layers[-1].head = dropped.head"
        )
    _link(layers)
    if last.recompute_block is not None:
        _regroup(layers)


def _link(layers: Sequence[MHCLayer]) -> None:
    """What is linked to a layer that is gone, or elsewhere, is linked to the one behind it."""
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        following = None if after is None else after.attention_site
        if layer.mlp_site.following not in (None, following):
            layer.mlp_site.following = following


def _regroup(layers: Sequence[MHCLayer]) -> None:
    """Put the layers into new recompute blocks, where the old ones have other sites than theirs."""
    sites = [site for layer in layers for site in (layer.attention_site, layer.mlp_site)]
    blocks = dict.fromkeys(layer.recompute_block for layer in layers)
    if [site for block in blocks if block is not None for site in block.sites] == sites:
        return
    block: Block | None = None
    for layer in layers:
        if block is None or not block.has_room():
            assert layer.recompute_plan is not None
            block = Block(layer.recompute_plan.layers, layer.mhc.backend)
        layer.recompute_block = layer.attention_site.block = layer.mlp_site.block = block
        block.join(layer.attention_site, layer.mlp_site)
