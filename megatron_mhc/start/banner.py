"""What the plugin says at start: one banner line, or why the model is not what was asked for."""

import os
from collections.abc import Iterable
from typing import Any

import torch

from megatron_mhc import kernels
from megatron_mhc.config import MHCConfig
from megatron_mhc.costs.formulas import parameters_of
from megatron_mhc.costs.recompute_plan import Plan
from megatron_mhc.costs.sites import Sites
from megatron_mhc.kernels.triton import tiles

from .refusals import DenseModelError


def _recompute(mhc: MHCConfig, plan: Plan | None, reference: bool, dtype: torch.dtype) -> str:
    """What the banner says of recompute, where the reference or the kernels run on such streams."""
    blocks = f"recompute {mhc.recompute}" if plan is None else plan.in_words
    if not reference:
        return str(plan or blocks)
    if dtype.itemsize < 4:
        return f"{blocks} gives no streams back: backend torch keeps fp32 copies of {dtype} streams"
    return f"{blocks} (what it saves is predicted for backend triton alone)"


def banner(
    mhc: MHCConfig,
    source: str,
    sites: int,
    parameters: int,
    device: torch.device,
    dtype: torch.dtype,
    plan: Plan | None = None,
) -> str:
    """The line that says how mHC is on.

    Args:
        mhc, source: the settings, and where they come from.
        sites, parameters: how many mHC has in the whole model.
        device, dtype: of the streams.
        plan: what the first stage's layers follow under recompute, where it is known already.

    Raises:
        ValueError: a file of tuned tiles that is none.
    """
    backend: str = mhc.backend
    if backend == "auto":
        reason = kernels.why_not_triton(mhc.num_streams, device)
        backend = "triton" if reason is None else f"torch, because {reason}"
    if backend.startswith("triton") and tiles.tuned():
        backend += f" with tiles of {os.environ[tiles.ENVIRONMENT_VARIABLE]}"
    steps = f", {mhc.sinkhorn_iterations} Sinkhorn iterations" if mhc.variant == "mhc" else ""
    dropped = ""
    if mhc.recompute is not None:
        dropped = f"; {_recompute(mhc, plan, backend.startswith('torch'), dtype)}"
    on_gpu = backend.startswith("triton") and device.type == "cuda"
    return (
        f"> mHC is on: {mhc.num_streams} streams, variant {mhc.variant}, convention"
        f" {mhc.convention_in_words}{steps}, init {mhc.init}, backend {backend}; {sites} sites,"
        f" {parameters:,} extra parameters{dropped} (settings from {source})"
        + ". The first step compiles the kernels where Triton's cache has none"
        * on_gpu
    )


def check_model(chunks: Iterable[torch.nn.Module], mhc: MHCConfig, *, trained: bool) -> bool:
    """Check that nobody trains an ordinary model in the belief that it has mHC.

    A process may hold several models: a student and its teacher, an actor and a reward model; and a
    model several networks: a decoder and a vision tower. What got no spec with mHC stays as it is.

    1. Layers that share a TransformerConfig are one network. It has sites on all layers or on none.
    2. A model that is trained has sites somewhere, unless this process has built another that has.
       So a run whose script ignores `args.spec` stops, and a critic beside an actor does not.

    A model that is built and never given an optimizer may be ordinary at any time.

    Args:
        chunks: the model chunks of this rank, wrapped or not.
        mhc: the settings that were asked for.
        trained: whether the model is the run's own, or gets an optimizer.

    Returns:
        Whether the model has sites on this rank.

    Raises:
        DenseModelError: what is said above does not hold.
        ValueError: the backend cannot run on the device that the model is on.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_layer import BaseTransformerLayer

    from megatron_mhc.model.layer import MHCLayer

    modules = [(name, m) for chunk in chunks for name, m in chunk.named_modules()]
    layers = [(name, m) for name, m in modules if isinstance(m, BaseTransformerLayer)]
    wide = [layer for _, layer in layers if isinstance(layer, MHCLayer)]
    dense = {name: layer for name, layer in layers if not isinstance(layer, MHCLayer)}
    networks = {id(layer.config) for layer in wide}
    if left_out := [name for name, layer in dense.items() if id(layer.config) in networks]:
        raise DenseModelError(
            f"mHC was asked for, but in a network that has it these layers have none:"
            f" {', '.join(left_out)}. Put with_mhc around the whole spec; a network that is to stay"
            " ordinary needs a TransformerConfig of its own"
        )
    stages = parallel_state.get_pipeline_model_parallel_world_size() if trained else 1
    is_bare = trained and not (wide or dense) and stages > 1
    if is_bare:
        MHCLayer.is_any_built = True
    if trained and not layers and stages == 1 and not MHCLayer.is_any_built:
        raise DenseModelError(
            "mHC was asked for, and the model has none of Megatron's layers. A HybridModel's are"
            " what --hybrid-layer-pattern names: give it. A model of another kind has no place for"
            " mHC"
        )
    if trained and dense and not wide and not MHCLayer.is_any_built:
        raise DenseModelError(
            f"mHC was asked for, but these layers have none: {', '.join(dense)}"
            ", and no other model of this process has it. The script builds its model without"
            " args.spec: use a GPT script that honours --spec, or put with_mhc around the spec"
            " where the script makes it. If an ordinary model is to be trained too, build the one"
            " with mHC first"
            + "; and give each pipeline stage a layer of its decoder"
            * (stages > 1)
        )
    for layer in wide[:1]:
        device = next(layer.parameters()).device
        kernels.resolve_backend(mhc.backend, mhc.num_streams, device)
    return bool(wide) or is_bare


def print_banner(line: str) -> None:
    """Print on the first rank alone (the only one where nothing is distributed)."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        print(line, flush=True)


def announce_spec(mhc: MHCConfig, source: str, transformer_config: Any) -> None:
    """Print the banner before a model is built, from its sizes: on the `--spec` route alone."""
    # a tensor's device: where the CPU stands in for CUDA, that is the CPU
    device = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu").device
    sites = Sites.of(transformer_config)
    counts = (sites.built, parameters_of(mhc, sites, transformer_config.hidden_size))
    print_banner(banner(mhc, source, *counts, device, transformer_config.params_dtype))
