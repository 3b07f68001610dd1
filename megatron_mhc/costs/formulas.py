"""What mHC costs beside the ordinary model, by formula: parameters, FLOPs, activation bytes."""

import argparse

from megatron_mhc.config import MHCConfig

from .sites import Sites


def parameters_of(mhc: MHCConfig, sites: Sites, hidden_size: int) -> int:
    """How many parameters mHC adds to a model with these sites."""
    n = mhc.num_streams
    rows = n * n + 2 * n
    projection = (n + 2) * hidden_size if mhc.variant == "hc" else rows * n * hidden_size
    head = n * n * hidden_size + n + 1 if mhc.learned_head else 0
    return sites.built * (projection + 3 + rows) + (1 + sites.mtp_layers) * head


def forward_flops_a_token(mhc: MHCConfig, sites: Sites, hidden_size: int) -> int:
    """FLOPs a token of the forward: two for each product that runs over the channels.

    At a site: v . v for the norm, z = phi v, u = H_pre x, y = H_res x + H_post^T f (variant "hc":
    theta times each stream instead of phi v). As in Megatron's own count of a model, what is done
    once a coefficient (scales, Sinkhorn) or once a channel (the mean at the end) is left out.
    """
    n, width = mhc.num_streams, hidden_size
    projection = (n + 2) * n * width if mhc.variant == "hc" else (n * n + 2 * n) * n * width
    site = n * width + projection + n * width + n * n * width + n * width
    projected = n * width + n * n * width if mhc.learned_head else 0
    head = projected + n * width if mhc.end != "mean" else 0
    return 2 * (sites.run * site + (1 + sites.mtp_depths) * head)


def training_flops_a_token(args: argparse.Namespace, mhc: MHCConfig) -> int:
    """FLOPs a token of a training step: a product's backward is two products more.

    Args:
        args: Megatron's parsed arguments.
        mhc: the settings.
    """
    return 3 * forward_flops_a_token(mhc, Sites.of(args), args.hidden_size)


def activation_bytes_a_token(
    mhc: MHCConfig, sites: int, hidden_size: int, element_size: int
) -> int:
    """What so many sites keep for the backward beyond the ordinary model, a token and a microbatch.

    With the Triton kernels and without `MHCConfig.recompute` (see `memory.Plan` for that): at a
    site the n streams, u and F's output, where the ordinary model keeps its residual; and in fp32
    H_post, H_res, their n*n + 2n logits and 1/r; H_pre too where sites are delayed.
    """
    n, stream = mhc.num_streams, hidden_size * element_size
    coefficients = 4 * (n * n + n + n * n + 2 * n + 1 + n * mhc.delayed)
    return sites * ((n + 1) * stream + coefficients)


def full_recompute_bytes_a_token(
    mhc: MHCConfig,
    layers: int,
    hidden_size: int,
    element_size: int,
    method: str,
    length: int,
    sites_a_layer: int = 2,
) -> tuple[int, int]:
    """The same under Megatron's full recompute, of a model chunk: what is kept, what is rebuilt.

    A recomputed block keeps its input alone, n streams instead of one; in the backward one block at
    a time, of one microbatch, has all that its layers keep.

    Args:
        method, length: `--recompute-method` and `--recompute-num-layers`: "uniform" makes blocks of
            so many layers, "block" recomputes so many layers of the chunk, each by itself.
    """
    sizes = (hidden_size, element_size)
    if method == "uniform":
        blocks, block, others = -(-layers // length), min(length, layers), 0
    else:
        blocks = min(length, layers)
        block, others = min(blocks, 1), layers - blocks
    inputs = blocks * (mhc.num_streams - 1) * hidden_size * element_size
    kept = inputs + activation_bytes_a_token(mhc, sites_a_layer * others, *sizes)
    return kept, activation_bytes_a_token(mhc, sites_a_layer * block, *sizes)
