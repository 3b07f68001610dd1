"""Which sites run in one autograd region, outside any graph or node: those alone may be fused."""

from typing import Any

from .compatibility import holds_attention_alone


def runs_on_into_the_next(config: Any) -> bool:
    """Whether a layer and the next one run in one autograd region, outside any graph.

    The next site's input, left on it by this layer, would have no gradient across a checkpoint,
    would be stale across a CUDA graph, and would belong to another node of a schedule. Whole-layer
    offloading brings a layer's tensors back when its output's gradient is there: before that of
    such an input, which comes from inside the next layer.
    """
    is_graph = config.cuda_graph_impl in ("local", "transformer_engine")
    is_graph = is_graph and not holds_attention_alone(config)
    is_apart = config.overlap_moe_expert_parallel_comm or config.cpu_offloading
    return config.recompute_granularity != "full" and not (is_graph or is_apart)


def is_one_region(config: Any, is_moe: bool) -> bool:
    """Whether a layer's residual slot of attention and norm slot of the MLP are in one region.

    The nodes of expert-parallel overlap end behind an MoE layer's router, and in front of a dense
    layer's MLP. Transformer Engine's graphs may hold the MLP's part alone.
    """
    if config.overlap_moe_expert_parallel_comm and not is_moe:
        return False
    if config.cuda_graph_impl != "transformer_engine" or holds_attention_alone(config):
        return True
    held = {module.name for module in config.cuda_graph_modules}
    return not held or {"attn"} < held & {"attn", *(("moe", "moe_router") if is_moe else ("mlp",))}
