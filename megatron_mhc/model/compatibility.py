"""What mHC cannot work with, each with a sentence that says what to change."""

from typing import Any

from megatron_mhc.config import MHCConfig
from megatron_mhc.patches.supported_versions import is_installed

from .conflict import Conflict, is_set
from .hybrid_conflicts import HYBRID_CONFLICTS
from .native_mhc import NATIVE_CONFLICTS, shared_conflicts


def _whole_step_is_a_graph(settings: Any) -> bool:
    return getattr(settings, "cuda_graph_impl", None) == "full_iteration"


def _layers_are_graphs(settings: Any, *implementations: str) -> bool:
    return getattr(settings, "cuda_graph_impl", None) in (
        implementations or ("local", "transformer_engine")
    )


def _is_graphed(settings: Any) -> bool:
    return _whole_step_is_a_graph(settings) or _layers_are_graphs(settings)


def holds_attention_alone(settings: Any) -> bool:
    """Whether a layer's graph is self-attention, with every site outside.

    Expert-parallel overlap wants Megatron's own graph of attention, which a node of its schedule
    goes on from.

    Args:
        settings: a TransformerConfig, or Megatron's parsed arguments.
    """
    if getattr(settings, "cuda_graph_impl", None) != "transformer_engine":
        return False
    modules = getattr(settings, "cuda_graph_modules", None) or ()
    names = {getattr(module, "name", module) for module in modules}
    return names == {"attn"} and not getattr(settings, "overlap_moe_expert_parallel_comm", False)


def _site_is_graphed(settings: Any) -> bool:
    return _is_graphed(settings) and not holds_attention_alone(settings)


def _last_layer_has_experts(settings: Any) -> bool:
    """Whether the model's last layer is an MoE layer (Megatron's `moe_layer_freq`)."""
    layers = settings.num_layers
    frequency = getattr(settings, "moe_layer_freq", 1)
    if isinstance(frequency, int):
        return (layers - 1) % frequency == 0
    return bool(frequency[-1])


def _has_any(settings: Any, *names: str) -> bool:
    """A setting that TransformerConfig and Megatron's parsed arguments call by different names."""
    return any(getattr(settings, name, None) for name in names)


_ATTENTION_ALONE = (
    "--cuda-graph-impl transformer_engine --cuda-graph-modules attn, whose graphs hold no site"
)

CONFLICTS_OF_0_18 = (
    Conflict(
        "--mtp-num-layers",
        is_set("mtp_num_layers", 0),
        "multi-token prediction with mHC is tested with Megatron-Core 0.19 alone; drop the flag, or"
        " install 0.19",
    ),
    Conflict(
        "--cuda-graph-impl",
        _is_graphed,
        "CUDA graphs with mHC are tried with Megatron-Core 0.19 alone; use --cuda-graph-impl none",
    ),
)
"""Refused with 0.18, where it is untested; it works with 0.19."""

CONFLICTS = (
    *(CONFLICTS_OF_0_18 if is_installed("<0.19") else ()),
    Conflict(
        "--fp32-residual-connection",
        is_set("fp32_residual_connection"),
        "the streams are kept in the model's dtype; drop the flag",
    ),
    Conflict(
        "--fused-residual-rmsnorm",
        is_set("fused_residual_rmsnorm"),
        "it fuses an addition that mHC replaces; drop the flag",
    ),
    Conflict(
        "--recompute-modules layernorm",
        lambda s: (
            "layernorm" in (getattr(s, "recompute_modules", None) or ())
            and getattr(s, "recompute_granularity", None) == "selective"
        ),
        "the norm slot reads the streams; take layernorm off the list",
    ),
    Conflict(
        "--no-overlap-p2p-communication with two stages and virtual ones",
        lambda s: (
            getattr(s, "pipeline_model_parallel_size", None) == 2
            and getattr(s, "virtual_pipeline_model_parallel_size", None) is not None
            and not getattr(s, "overlap_p2p_comm", False)
        ),
        "Megatron mixes up its messages there (Megatron-LM issue 1450); drop the flag",
    ),
    Conflict(
        "--heterogeneous-layers-config-path",
        lambda s: _has_any(s, "heterogeneous_block_specs", "heterogeneous_layers_config_path"),
        "layers of different kinds are not tried yet; drop the flag",
    ),
    Conflict(
        "--cuda-graph-impl local with experts",
        lambda s: _layers_are_graphs(s, "local") and _has_any(s, "num_moe_experts", "num_experts"),
        "Megatron's local graphs hold whole layers, and experts that drop no token do not fit in"
        " one; use --cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router",
    ),
    Conflict(
        "--cuda-graph-impl with --mhc-log-interval",
        lambda s: _site_is_graphed(s) and bool(getattr(s, "mhc_log_interval", 0)),
        "a replayed graph runs none of the code that would record it; drop one of the two, or use"
        f" {_ATTENTION_ALONE}",
    ),
    Conflict(
        "--offload-modules attn_norm or mlp_norm",
        lambda s: (
            is_set("fine_grained_activation_offloading")(s)
            and not {"attn_norm", "mlp_norm"}.isdisjoint(getattr(s, "offload_modules", None) or ())
        ),
        "these norms read the streams, which the residual slot reads again; take them off the"
        " list (the modules inside a sublayer work)",
    ),
    Conflict(
        "--inference-fuse-tp-communication",
        is_set("inference_fuse_tp_communication"),
        "it adds the residual inside its linears and leaves mHC's slots out; drop the flag",
    ),
    Conflict(
        "--overlap-moe-expert-parallel-comm with a dense last layer",
        lambda s: is_set("overlap_moe_expert_parallel_comm")(s) and not _last_layer_has_experts(s),
        "Megatron's schedule then forgets the final norm, without mHC too; give the last layer"
        " experts (--moe-layer-freq), or drop the flag",
    ),
    Conflict(
        "--use-megatron-fsdp with --mhc-log-interval",
        lambda s: is_set("use_megatron_fsdp")(s) and bool(getattr(s, "mhc_log_interval", 0)),
        "gradients are sharded in a way that the metrics do not know; drop one of the two",
    ),
    Conflict(
        "--use-torch-fsdp2",
        is_set("use_torch_fsdp2"),
        "it wants one dtype in a layer, and mHC's parameters stay fp32; use --use-megatron-fsdp, or"
        " the distributed optimizer",
    ),
)

_INTERLEAVED = "virtual_pipeline_model_parallel_size"

_OFFLOADED_LATE = Conflict(
    "--delay-offload-until-cuda-graph beside --mhc-recompute",
    is_set("delay_offload_until_cuda_graph"),
    "what is offloaded late has been dropped by then; use one of the two",
)

RECOMPUTE_CONFLICTS = (
    *(() if is_installed("<0.19") else (_OFFLOADED_LATE,)),
    Conflict(
        "--cpu-offloading-num-layers beside --mhc-recompute",
        # a TransformerConfig has the first, Megatron's arguments the second
        lambda s: is_set("cpu_offloading")(s) or is_set("cpu_offloading_num_layers", 0)(s),
        "what is offloaded behind a layer has been dropped by then; use one of the two"
        " (--fine-grained-activation-offloading goes with --mhc-recompute)",
    ),
    Conflict(
        "--overlap-moe-expert-parallel-comm beside --mhc-recompute",
        is_set("overlap_moe_expert_parallel_comm"),
        "what one node of its schedule drops another one on another stream would read; use one of"
        " the two",
    ),
    Conflict(
        "--recompute-granularity full beside --mhc-recompute",
        is_set("recompute_granularity", "selective"),
        "it keeps nothing inside a layer, so the streams are gone already and rebuilding them is"
        " work for nothing; use one of the two (selective goes with --mhc-recompute)",
    ),
    Conflict(
        "--cuda-graph-impl beside --mhc-recompute",
        _site_is_graphed,
        "a graph reads the memory that it was captured with, and recompute gives that away; use one"
        f" of the two, or {_ATTENTION_ALONE}",
    ),
)
"""What selective recompute of the streams cannot work with."""

OVERLAP_CONFLICTS = (
    Conflict(
        "--mhc-overlap-p2p with --overlap-moe-expert-parallel-comm",
        is_set("overlap_moe_expert_parallel_comm"),
        "its schedule places the ends of a stage and their messages itself; drop one of the two",
    ),
    Conflict(
        "--mhc-overlap-p2p without --pipeline-model-parallel-size",
        lambda s: getattr(s, "pipeline_model_parallel_size", 1) == 1,
        "one stage has nobody to exchange anything with; drop the flag, or add stages",
    ),
    Conflict(
        "--mhc-overlap-p2p with virtual stages and --no-overlap-p2p-communication",
        lambda s: (
            getattr(s, _INTERLEAVED, None) is not None and not getattr(s, "overlap_p2p_comm", False)
        ),
        "the interleaved schedule then waits for each exchange; drop one of the two",
    ),
    Conflict(
        "--mhc-overlap-p2p with variable_seq_lengths",
        is_set("variable_seq_lengths"),
        "stages then wait to tell each other their shapes; give every microbatch one length",
    ),
    Conflict(
        "--mhc-overlap-p2p with use_ring_exchange_p2p",
        is_set("use_ring_exchange_p2p"),
        "a ring exchange is waited for at once; turn one of the two off",
    ),
    Conflict(
        "--mhc-overlap-p2p with num_microbatches_with_partial_activation_checkpoints",
        is_set("num_microbatches_with_partial_activation_checkpoints"),
        "its schedule checkpoints all microbatches alike; leave it unset",
    ),
    Conflict(
        "--mhc-overlap-p2p with moe_paged_stash",
        is_set("moe_paged_stash"),
        "its schedule does not stash experts' activations; turn one of the two off",
    ),
    Conflict(
        "--mhc-overlap-p2p with --cuda-graph-impl",
        _is_graphed,
        "the ends of a stage run on streams that a graph does not know; use one of the two",
    ),
)
"""What the schedules of `overlap_p2p` have no place for."""

REFERENCE_CONFLICTS = (
    Conflict(
        "--cuda-graph-impl local without Triton's kernels",
        lambda s: _layers_are_graphs(s, "local"),
        "it keeps what Python functions save for the backward, and PyTorch's own operations save"
        " unseen; use --mhc-backend triton and --mhc-variant mhc, or another implementation",
    ),
)
"""What PyTorch's own operations cannot work with: backend "torch", and variant "hc", part of whose
coefficients they are."""

IN_FLIGHT_CONFLICTS = (
    Conflict(
        "--mhc-overlap-in-flight 2 with virtual stages",
        is_set(_INTERLEAVED),
        "the interleaved schedule is Megatron's and starts as many microbatches as it likes; drop"
        " the flag, or the virtual stages",
    ),
)
"""What `overlap_in_flight` of 2 has no effect on."""


def check_transformer_config(settings: Any, mhc: MHCConfig | None = None) -> None:
    """Refuse settings that mHC cannot work with.

    Args:
        settings: a TransformerConfig, or Megatron's parsed arguments (the names agree).
        mhc: mHC's own settings, the defaults if None.

    Raises:
        ValueError: names every such setting and what to do about it.
    """
    asked: tuple[Conflict, ...] = (
        () if mhc is None or mhc.recompute is None else RECOMPUTE_CONFLICTS
    )
    if mhc is not None and mhc.overlap_p2p:
        asked += OVERLAP_CONFLICTS
    if mhc is not None and (mhc.backend == "torch" or mhc.variant == "hc"):
        asked += REFERENCE_CONFLICTS
    if mhc is not None and mhc.overlap_in_flight > 1:
        asked += IN_FLIGHT_CONFLICTS
    asked += shared_conflicts(mhc or MHCConfig())
    conflicts = CONFLICTS + HYBRID_CONFLICTS + NATIVE_CONFLICTS + asked
    found = [c for c in conflicts if c.given(settings)]
    if found:
        lines = "; ".join(f"{conflict.flag}: {conflict.advice}" for conflict in found)
        raise ValueError(f"mHC does not work with these settings: {lines}")
