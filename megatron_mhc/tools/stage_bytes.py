"""What a GPU holds of a pipeline stage: weights and what goes with them, and mHC's activations."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_mhc.config import MHCConfig
from megatron_mhc.costs.formulas import activation_bytes_a_token, full_recompute_bytes_a_token
from megatron_mhc.costs.recompute_plan import most_in_flight, plan_of
from megatron_mhc.costs.sites import distinct_mtp_layers, hybrid_pattern


def bytes_of_states(args: argparse.Namespace, chunks: list[torch.nn.Module]) -> float:
    """Weights, gradients and optimizer states of this rank.

    A parameter, its gradient (fp32 beside bf16 weights) and Adam's two fp32 averages, with an fp32
    copy of what is not fp32; the distributed optimizer shards averages and copies.
    """
    from megatron.core import parallel_state

    dense = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    expert = parallel_state.get_expert_data_parallel_world_size()
    total = 0.0
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        own = parameter.element_size()
        gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else own
        shards = dense if getattr(parameter, "allreduce", True) else expert
        states = 8.0 if own >= 4 else 12.0
        states /= shards if args.use_distributed_optimizer else 1
        total += parameter.numel() * (own + gradient + states)
    return total


def _own_norms(args: argparse.Namespace, layers: Sequence[Any]) -> float:
    """Norms of a layer that are modules of their own with Transformer Engine, on average.

    It fuses the others into the projections behind them.
    """
    own = 0
    for layer in layers:
        own += args.multi_latent_attention and hasattr(layer, "attention_site")
        own += hasattr(layer, "mlp_site") and layer.is_moe_layer
    return own / len(layers)


def bytes_of_streams(
    args: argparse.Namespace, mhc: MHCConfig, chunks: list[torch.nn.Module], stage: int
) -> tuple[float, str]:
    """What mHC adds to this rank's activations, in bytes a token, and how that was reckoned."""
    plan = plan_of(chunks)
    if plan is not None:
        if args.transformer_impl == "transformer_engine":
            layers = [layer for chunk in chunks for layer in layers_of(chunk)]
            layers = [layer for layer in layers if not layer.is_mtp]
            if hybrid_pattern(args) is None:
                layers = layers[:1]  # whose plan it is
            plan = dataclasses.replace(plan, norms=_own_norms(args, layers))
        return sum(plan.bytes_a_token.values()), plan.in_words
    in_flight = most_in_flight(chunks[0].config, mhc, stage)
    sizes = (args.hidden_size, args.params_dtype.itemsize)
    kept, rebuilt = 0, 0
    for chunk in chunks:
        whole = layers_of(chunk)
        if args.recompute_granularity == "full":
            decoder = sum(not layer.is_mtp for layer in whole)
            inputs, block = full_recompute_bytes_a_token(
                mhc,
                decoder,
                *sizes,
                args.recompute_method,
                args.recompute_num_layers,
                len(whole[0].sites),
            )
            kept, rebuilt = kept + inputs, max(rebuilt, block)
            # multi-token prediction starts from one stream, and "block" does not recompute it
            whole = [m for m in whole if m.is_mtp and args.recompute_method == "block"]
        kept += activation_bytes_a_token(mhc, sum(map(sites_passed(args), whole)), *sizes)
    unit = "microbatch" if in_flight == 1 else "microbatches"
    return kept * in_flight / len(chunks) + rebuilt, f"{in_flight} {unit} in flight"


def sites_passed(args: argparse.Namespace) -> Callable[[Any], int]:
    """How many sites a token passes in a layer: one of multi-token prediction may run at several
    depths."""
    depths = (args.mtp_num_layers or 0) // max(distinct_mtp_layers(args), 1)
    return lambda layer: len(layer.sites) * (depths if layer.is_mtp else 1)


def layers_of(chunk: torch.nn.Module) -> list[Any]:
    """The layers with sites."""
    from megatron_mhc.model.layer import MHCLayer

    return [module for module in chunk.modules() if isinstance(module, MHCLayer)]
