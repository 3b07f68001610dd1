"""What mHC refuses, and that each refusal is named."""

import argparse
import contextlib
import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_mhc import MHCConfig
from megatron_mhc.model.compatibility import (
    CONFLICTS,
    IN_FLIGHT_CONFLICTS,
    OVERLAP_CONFLICTS,
    RECOMPUTE_CONFLICTS,
    REFERENCE_CONFLICTS,
    check_transformer_config,
)
from megatron_mhc.model.hybrid_conflicts import HYBRID_CONFLICTS
from megatron_mhc.patches.supported_versions import is_installed
from megatron_mhc.start.flags import add_mhc_arguments

GIVEN = {
    "--fp32-residual-connection": {"fp32_residual_connection": True},
    "--fused-residual-rmsnorm": {"fused_residual_rmsnorm": True},
    "--recompute-modules layernorm": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "layernorm"],
    },
    "--no-overlap-p2p-communication with two stages and virtual ones": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "overlap_p2p_comm": False,
    },
    "--heterogeneous-layers-config-path": {"heterogeneous_block_specs": True},
    "--mtp-num-layers": {"mtp_num_layers": 1},  # with Megatron-Core 0.18
    "--hybrid-layer-pattern with --overlap-moe-expert-parallel-comm": {
        "hybrid_layer_pattern": "*E",
        "overlap_moe_expert_parallel_comm": True,
        "num_layers": 2,
    },
    "--hybrid-layer-pattern with --transformer-impl inference_optimized": {
        "hybrid_layer_pattern": "*-",
        "transformer_impl": "inference_optimized",
    },
    "--hybrid-layer-pattern with --cuda-graph-impl": {
        "hybrid_layer_pattern": "*-",
        "cuda_graph_impl": "full_iteration",
    },
    "--cuda-graph-impl": {"cuda_graph_impl": "full_iteration"},  # the same
    "--cuda-graph-impl local with experts": {"cuda_graph_impl": "local", "num_moe_experts": 8},
    "--cuda-graph-impl with --mhc-log-interval": {
        "cuda_graph_impl": "transformer_engine",
        "mhc_log_interval": 10,
    },
    "--cuda-graph-impl beside --mhc-recompute": {"cuda_graph_impl": "transformer_engine"},
    "--cuda-graph-impl local without Triton's kernels": {"cuda_graph_impl": "local"},
    "--cpu-offloading-num-layers beside --mhc-recompute": {"cpu_offloading_num_layers": 1},
    "--offload-modules attn_norm or mlp_norm": {
        "fine_grained_activation_offloading": True,
        "offload_modules": ["core_attn", "mlp_norm"],
    },
    "--delay-offload-until-cuda-graph beside --mhc-recompute": {
        "delay_offload_until_cuda_graph": True
    },
    "--inference-fuse-tp-communication": {"inference_fuse_tp_communication": True},
    "--overlap-moe-expert-parallel-comm with a dense last layer": {
        "overlap_moe_expert_parallel_comm": True,
        "num_layers": 4,
        "moe_layer_freq": [1, 1, 1, 0],
    },
    "--overlap-moe-expert-parallel-comm beside --mhc-recompute": {
        "overlap_moe_expert_parallel_comm": True,
        "num_layers": 4,
        "moe_layer_freq": 1,
    },
    "--use-megatron-fsdp with --mhc-log-interval": {
        "use_megatron_fsdp": True,
        "mhc_log_interval": 10,
    },
    "--use-torch-fsdp2": {"use_torch_fsdp2": True},
    "--recompute-granularity full beside --mhc-recompute": {"recompute_granularity": "full"},
}


def refused_anyway(settings: argparse.Namespace) -> bool:
    """Megatron 0.18's CUDA graphs, whatever else is given."""
    return is_installed("<0.19") and getattr(settings, "cuda_graph_impl", "none") != "none"


@pytest.mark.parametrize(
    "conflict", CONFLICTS + HYBRID_CONFLICTS, ids=lambda conflict: conflict.flag
)
def test_conflicts_are_named(conflict) -> None:
    plain = {"recompute_modules": ["core_attn"], "cuda_graph_impl": "none", "mtp_num_layers": None}
    check_transformer_config(argparse.Namespace(**plain, pipeline_model_parallel_size=2))
    check_transformer_config(argparse.Namespace(**plain, hybrid_layer_pattern="M*-E"))
    graph = {"cuda_graph_impl": "full_iteration", "mhc_log_interval": 0}
    if not refused_anyway(argparse.Namespace(**graph)):
        check_transformer_config(argparse.Namespace(**(plain | graph)))
    settings = argparse.Namespace(**(plain | GIVEN[conflict.flag]))
    with pytest.raises(ValueError) as error:
        check_transformer_config(settings)
    assert f"{conflict.flag}: {conflict.advice}" in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"heterogeneous_layers_config_path": "layers.json"},
        {"cuda_graph_impl": "local", "num_experts": 8},
    ],
    ids=str,
)
def test_arguments_that_a_config_calls_otherwise_are_refused_before_there_is_one(
    given: dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match=r"of different kinds|graphs"):
        check_transformer_config(argparse.Namespace(**given))


@pytest.mark.parametrize("settings", [{"backend": "torch"}, {"variant": "hc"}], ids=str)
@pytest.mark.parametrize("conflict", REFERENCE_CONFLICTS, ids=lambda conflict: conflict.flag)
def test_conflicts_with_the_reference_are_named(conflict, settings: dict[str, Any]) -> None:
    given = argparse.Namespace(**GIVEN[conflict.flag])
    if not refused_anyway(given):
        check_transformer_config(given, MHCConfig())
    with pytest.raises(ValueError) as error:
        check_transformer_config(given, MHCConfig(**settings))
    assert f"{conflict.flag}: {conflict.advice}" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "has_experts"),
    [
        ({"moe_layer_freq": 1}, True),
        ({"moe_layer_freq": 2}, False),  # layers 0 and 2 of four
        ({"moe_layer_freq": 3}, True),
        ({"moe_layer_freq": [1, 1, 0, 0]}, False),
        ({"moe_layer_freq": [0, 0, 0, 1]}, True),
    ],
    ids=str,
)
def test_overlap_wants_experts_in_the_last_layer(
    settings: dict[str, Any], has_experts: bool
) -> None:
    given = {"overlap_moe_expert_parallel_comm": True, "num_layers": 4, **settings}
    outcome = contextlib.nullcontext() if has_experts else pytest.raises(ValueError, match="dense")
    with outcome:
        check_transformer_config(argparse.Namespace(**given))


@pytest.mark.parametrize("as_names", [True, False], ids=["names", "enum"])
def test_graphs_of_attention_alone_go_with_recompute_and_metrics(as_names: bool) -> None:
    """As Megatron's arguments name the modules, and as its configuration has them."""
    module = "attn" if as_names else SimpleNamespace(name="attn")
    graph = {"cuda_graph_impl": "transformer_engine", "mhc_log_interval": 10}
    recompute = MHCConfig(recompute="auto")
    alone = argparse.Namespace(**graph, cuda_graph_modules=[module])
    if not refused_anyway(alone):
        check_transformer_config(alone, recompute)
    for more in (
        {"cuda_graph_modules": [module, "moe_router"]},
        {"cuda_graph_modules": []},
        {"cuda_graph_modules": [module], "overlap_moe_expert_parallel_comm": True},
    ):
        with pytest.raises(ValueError, match="beside --mhc-recompute") as error:
            check_transformer_config(argparse.Namespace(**graph, num_layers=4, **more), recompute)
        assert "with --mhc-log-interval" in str(error.value)


@pytest.mark.parametrize("conflict", RECOMPUTE_CONFLICTS, ids=lambda conflict: conflict.flag)
def test_conflicts_with_recompute_are_named(conflict) -> None:
    settings = argparse.Namespace(**GIVEN[conflict.flag])
    if not refused_anyway(settings):
        check_transformer_config(settings, MHCConfig())
    check_transformer_config(
        argparse.Namespace(recompute_granularity="selective", recompute_modules=["mlp"]),
        MHCConfig(recompute="auto"),
    )
    with pytest.raises(ValueError) as error:
        check_transformer_config(settings, MHCConfig(recompute="auto"))
    assert f"{conflict.flag}: {conflict.advice}" in str(error.value)


GIVEN_WITH_OVERLAP = {
    "without --pipeline-model-parallel-size": {"pipeline_model_parallel_size": 1},
    "with virtual stages and --no-overlap-p2p-communication": {
        "pipeline_model_parallel_size": 4,
        "virtual_pipeline_model_parallel_size": 2,
        "overlap_p2p_comm": False,
    },
    "with variable_seq_lengths": {"variable_seq_lengths": True},
    "with use_ring_exchange_p2p": {"use_ring_exchange_p2p": True},
    "with num_microbatches_with_partial_activation_checkpoints": {
        "num_microbatches_with_partial_activation_checkpoints": 1
    },
    "with moe_paged_stash": {"moe_paged_stash": True},
    "with --cuda-graph-impl": {"cuda_graph_impl": "local"},
    "with --overlap-moe-expert-parallel-comm": {
        "overlap_moe_expert_parallel_comm": True,
        "num_layers": 4,
        "moe_layer_freq": 1,
    },
    "--mhc-overlap-in-flight 2 with virtual stages": {
        "virtual_pipeline_model_parallel_size": 2,
        "overlap_p2p_comm": True,
    },
}


@pytest.mark.parametrize(
    ("conflict", "in_flight"),
    [
        *((conflict, 1) for conflict in OVERLAP_CONFLICTS),
        *((conflict, 2) for conflict in IN_FLIGHT_CONFLICTS),
    ],
)
def test_conflicts_of_overlap_are_named(conflict, in_flight: int) -> None:
    given = GIVEN_WITH_OVERLAP[conflict.flag.removeprefix("--mhc-overlap-p2p ")]
    settings = argparse.Namespace(**({"pipeline_model_parallel_size": 4} | given))
    if not refused_anyway(settings):
        check_transformer_config(settings)
    if in_flight == 2:
        check_transformer_config(settings, MHCConfig(overlap_p2p=True))
    overlap = MHCConfig(overlap_p2p=True, overlap_in_flight=in_flight)
    check_transformer_config(argparse.Namespace(pipeline_model_parallel_size=4), overlap)
    with pytest.raises(ValueError) as error:
        check_transformer_config(settings, overlap)
    assert f"{conflict.flag}: {conflict.advice}" in str(error.value)


class Asked:
    """Settings that remember which names were asked for."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.names = given, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return self.given.get(name)


@functools.cache
def megatrons_settings() -> set[str]:
    """What this release's TransformerConfig and its parser call their settings."""
    from megatron.core.transformer import TransformerConfig
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    return fields | {action.dest for action in parser._actions}


ALL_CONFLICTS = (
    *CONFLICTS,
    *HYBRID_CONFLICTS,
    *RECOMPUTE_CONFLICTS,
    *REFERENCE_CONFLICTS,
    *OVERLAP_CONFLICTS,
    *IN_FLIGHT_CONFLICTS,
)


@pytest.mark.parametrize("conflict", ALL_CONFLICTS, ids=lambda conflict: conflict.flag)
def test_conflicts_look_at_settings_that_megatron_has(conflict) -> None:
    """A setting that Megatron renames is never found in conflict again, and nothing else says so.

    All of a conflict's conditions hold, so it asks for every name that it knows.
    """
    given = {**GIVEN, **GIVEN_WITH_OVERLAP}[conflict.flag.removeprefix("--mhc-overlap-p2p ")]
    settings = Asked(given)
    assert conflict.given(settings)
    ours = {name for name in settings.names if name.startswith("mhc_")}
    assert not settings.names - megatrons_settings() - ours
    parser = argparse.ArgumentParser()
    add_mhc_arguments(parser)
    assert ours <= vars(parser.parse_args([])).keys()
