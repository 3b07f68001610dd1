"""MHCConfig, its flags and its environment variables."""

import argparse
import contextlib
import dataclasses
import functools
from typing import Any

import pytest
import torch

from megatron_mhc import MHCConfig
from megatron_mhc.costs.formulas import sites_and_parameters
from megatron_mhc.model.compatibility import (
    CONFLICTS,
    IN_FLIGHT_CONFLICTS,
    OVERLAP_CONFLICTS,
    RECOMPUTE_CONFLICTS,
    REFERENCE_CONFLICTS,
    check_transformer_config,
)
from megatron_mhc.model.connection import Head, HyperConnection
from megatron_mhc.patches.releases import is_installed
from megatron_mhc.start.flags import (
    SETTINGS,
    add_mhc_arguments,
    config_from_arguments,
    config_from_environment,
    prepare_arguments,
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_streams": 0}, "num_streams is 0; expected an int, at least 1"),
        ({"num_streams": 4.0}, "num_streams is 4.0; expected an int"),
        ({"num_streams": True}, "num_streams is True; expected an int"),
        ({"num_streams": "4"}, "num_streams is '4'; expected an int"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations is 0; expected an int, at least 1"),
        ({"sinkhorn_iterations": 2.5}, "sinkhorn_iterations is 2.5; expected an int"),
        ({"convention": "v4"}, "convention is 'v4'; expected one of paper, deepseek_v4"),
        ({"init": "random"}, "init is 'random'; expected one of residual, zero"),
        ({"variant": "HC"}, "variant is 'HC'; expected one of mhc, hc"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of auto, triton, torch"),
        ({"variant": "hc", "sinkhorn_iterations": 5}, "sinkhorn_iterations is 5, .* default, 20"),
        ({"variant": "hc", "convention": "deepseek_v4"}, "is 'deepseek_v4', which variant 'hc'"),
        ({"variant": "hc", "init": "zero"}, "init is 'zero', .* leave it at its default, 'resid"),
        ({"variant": "hc", "backend": "triton"}, "has the reference only"),
        ({"recompute": 0}, "recompute is 0; expected None, 'auto' or a number of layers"),
        ({"recompute": True}, "recompute is True; expected"),
        ({"recompute": "full"}, "recompute is 'full'; expected"),
        ({"recompute": 2.0}, "recompute is 2.0; expected"),
        ({"recompute": 2, "variant": "hc"}, "recompute is 2, but variant 'hc' keeps fp32"),
        ({"overlap_p2p": "0"}, "overlap_p2p is '0'; expected True or False"),
        ({"overlap_p2p": True, "overlap_in_flight": 3}, "overlap_in_flight is 3; expected 1 or 2"),
        ({"overlap_in_flight": True}, "overlap_in_flight is True; expected 1 or 2"),
        ({"overlap_in_flight": 2}, "overlap_in_flight is 2 without overlap_p2p"),
    ],
)
def test_refused_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MHCConfig(**settings)


def parse(*flags: str) -> argparse.Namespace:
    """The flags as Megatron's parser would have them, `--spec` included."""
    parser = add_mhc_arguments(argparse.ArgumentParser())
    parser.add_argument("--spec", nargs="*")
    return parser.parse_args(flags)


def test_flags_become_the_config() -> None:
    flags = ["--mhc-num-streams", "2", "--mhc-convention", "deepseek_v4", "--mhc-backend", "torch"]
    args = parse("--mhc", *flags)
    prepare_arguments(args)
    want = MHCConfig(num_streams=2, convention="deepseek_v4", backend="torch")
    assert config_from_arguments(args) == want
    assert args.spec == ["megatron_mhc.spec", "gpt_layer_spec"]
    # Megatron prints and stores its arguments: the defaults that apply stand among them
    assert args.mhc_sinkhorn_iterations == 20


def test_every_setting_has_a_flag() -> None:
    assert list(SETTINGS) == [field.name for field in dataclasses.fields(MHCConfig)]
    help_text = add_mhc_arguments(argparse.ArgumentParser()).format_help()
    for name in SETTINGS:
        assert "--mhc-" + name.replace("_", "-") in help_text


def test_a_spec_of_the_users_own_is_kept_for_mhc_to_go_around() -> None:
    args = parse("--mhc", "--spec", "mine", "layer")
    prepare_arguments(args)
    assert args.mhc_base_spec == ["mine", "layer"]


def test_naming_our_spec_turns_mhc_on() -> None:
    args = parse("--spec", "megatron_mhc.spec", "gpt_layer_spec", "--mhc-num-streams", "8")
    prepare_arguments(args)
    assert args.mhc and config_from_arguments(args).num_streams == 8


def test_settings_without_mhc_are_refused() -> None:
    with pytest.raises(
        ValueError, match="--mhc-num-streams, --mhc-overlap-p2p given without --mhc"
    ):
        prepare_arguments(parse("--mhc-num-streams", "4", "--mhc-overlap-p2p"))


def test_without_mhc_nothing_changes() -> None:
    args = parse("--spec", "mine", "layer")
    before = vars(args).copy()
    prepare_arguments(args)
    assert vars(args) == before


def test_environment_variables_become_the_config() -> None:
    environ = {"MHC_NUM_STREAMS": "8", "MHC_INIT": "zero", "PATH": "/bin"}
    assert config_from_environment(environ) == MHCConfig(num_streams=8, init="zero")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"MHC_STREAMS": "4"}, "MHC_STREAMS is set; known are MHC_BACKEND, "),
        ({"MHC_NUM_STREAMS": "four"}, "MHC_NUM_STREAMS is 'four'; expected a whole number"),
        (
            {"MHC_RECOMPUTE": "none"},
            "MHC_RECOMPUTE is 'none'; expected off, auto or a number of layers",
        ),
        ({"MHC_OVERLAP_P2P": "maybe"}, "MHC_OVERLAP_P2P is 'maybe'; expected 0 or 1"),
        ({"MHC_NUM_STREAMS": "-1"}, "num_streams is -1"),
    ],
)
def test_refused_environment(environ: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_environment(environ)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mhc-recompute none", "recompute: 'none'; expected off, auto or a number of layers"),
        ("--mhc-num-streams four", "--mhc-num-streams: 'four'; expected a whole number"),
    ],
)
def test_refused_flags(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--mhc", *flags.split())
    assert message in capsys.readouterr().err


def test_a_variable_beside_the_flags_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would read it: `MHC_NUM_STREAMS=8 ... --mhc` would train with four streams."""
    monkeypatch.setenv("MHC_NUM_STREAMS", "8")
    with pytest.raises(ValueError, match=r"MHC_NUM_STREAMS set .* give --mhc-num-streams"):
        prepare_arguments(parse("--mhc"))
    # of a run without mHC the variable says nothing
    prepare_arguments(parse())
    monkeypatch.delenv("MHC_NUM_STREAMS")
    monkeypatch.setenv("MHC_HOME", "/not/of/ours")
    prepare_arguments(parse("--mhc"))


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
    "--hybrid-layer-pattern": {"hybrid_layer_pattern": "M*M*"},
    "--cuda-graph-impl": {"cuda_graph_impl": "full_iteration"},  # the same
    "--cuda-graph-impl local with experts": {"cuda_graph_impl": "local", "num_moe_experts": 8},
    "--cuda-graph-impl with --mhc-log-interval": {
        "cuda_graph_impl": "transformer_engine",
        "mhc_log_interval": 10,
    },
    "--cuda-graph-impl beside --mhc-recompute": {"cuda_graph_impl": "transformer_engine"},
    "--cuda-graph-impl local without Triton's kernels": {"cuda_graph_impl": "local"},
    "--cpu-offloading-num-layers": {"cpu_offloading": True},
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


@pytest.mark.parametrize("conflict", CONFLICTS, ids=lambda conflict: conflict.flag)
def test_conflicts_are_named(conflict) -> None:
    plain = {"recompute_modules": ["core_attn"], "cuda_graph_impl": "none", "mtp_num_layers": None}
    check_transformer_config(argparse.Namespace(**plain, pipeline_model_parallel_size=2))
    graph = {"cuda_graph_impl": "full_iteration", "mhc_log_interval": 0}
    if not refused_anyway(argparse.Namespace(**graph)):
        check_transformer_config(argparse.Namespace(**(plain | graph)))
    settings = argparse.Namespace(**(plain | GIVEN[conflict.flag]))
    with pytest.raises(ValueError) as error:
        check_transformer_config(settings)
    assert f"{conflict.flag}: {conflict.advice}" in str(error.value)


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


@pytest.mark.parametrize(
    ("given", "value"), [("auto", "auto"), ("3", 3), ("off", None), (None, None)]
)
def test_recompute_from_flag_and_environment(given: str | None, value: int | str | None) -> None:
    args = parse("--mhc", *(() if given is None else ("--mhc-recompute", given)))
    prepare_arguments(args)
    assert config_from_arguments(args).recompute == value
    environ = {} if given is None else {"MHC_RECOMPUTE": given}
    assert config_from_environment(environ).recompute == value


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


ALL_CONFLICTS = (*CONFLICTS, *RECOMPUTE_CONFLICTS, *OVERLAP_CONFLICTS)


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
    assert ours <= vars(parse("--mhc")).keys()


@pytest.mark.parametrize("settings", [{}, {"convention": "deepseek_v4"}, {"variant": "hc"}])
def test_parameter_count_is_the_modules(settings: dict) -> None:
    mhc = MHCConfig(num_streams=3, **settings)
    modules = [HyperConnection(mhc, 10, site) for site in range(4)]
    modules += [Head(mhc, 10)] if mhc.learned_head else []
    count = sum(p.numel() for module in modules for p in module.parameters())
    assert sites_and_parameters(mhc, num_layers=2, hidden_size=10) == (4, count)


def test_parameters_stay_fp32_and_move() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), HyperConnection(MHCConfig(), 6, 0))
    module.bfloat16()
    assert module[0].weight.dtype == torch.bfloat16
    assert {p.dtype for p in module[1].parameters()} == {torch.float32}
    module.to("meta")
    assert {p.device.type for p in module[1].parameters()} == {"meta"}
    assert {p.dtype for p in module[1].parameters()} == {torch.float32}
