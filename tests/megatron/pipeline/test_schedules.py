"""n-wide streams between pipeline stages: every schedule trains as one process does."""

import json
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer import TransformerConfig

from megatron_mhc import MHCConfig
from megatron_mhc.model.config_marks import mark_streams, message_width
from megatron_mhc.patches import registry
from megatron_mhc.patches.pipeline_width import pipeline_width_patch
from tests.megatron.common.cases import beside, parameters
from tests.megatron.common.compare import assert_same_training
from tests.megatron.common.launch import run_scenarios
from tests.megatron.common.settings import (
    DELAYED,
    FULL_RECOMPUTE,
    HEAD,
    SGD,
    SUMMATION_ORDER,
    UNCLIPPED,
    VIRTUAL,
    layout,
    stages,
)

# No gradient norm and no tied weight: both are summed in another order over stages. Boundaries
# between layers apart, as they are between stages: fusing one adds its gradients in another order.
EXACT: dict[str, Any] = {
    "optimizer": UNCLIPPED,
    "tied": False,
    "fuse": "layer",
    "evaluate": True,
    "batch": 8,
}
# the shapes of messages go ahead of them: Megatron's `variable_seq_lengths`
VARIABLE: dict[str, Any] = {
    "microbatches": 4,
    "lengths": [32, 7, 24, 13],
    # the dispatcher that it wants, of a dense model too
    "config": {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"},
}
UNEVEN = {"num_layers_in_first_pipeline_stage": 1}
EMBEDDING = {"num_layers": 3, "account_for_embedding_in_pipeline_split": True}


# microbatches fewer than, as many as and more than the stages
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "1F1B, 1 microbatch": (2, {"microbatches": 1}, {"parallel": stages(2)}),
    "1F1B, 2 microbatches": (2, {"microbatches": 2}, {"parallel": stages(2)}),
    "1F1B, 4 microbatches": (2, {"microbatches": 4}, {"parallel": stages(2)}),
    "interleaved": (2, {"microbatches": 4}, {"parallel": VIRTUAL}),
    # a chunk after the first gathers its bf16 and fp32 parameters in one go
    "interleaved, bf16, distributed optimizer": (
        2,
        {"microbatches": 4, "bf16": True},
        {"parallel": VIRTUAL, "ddp": {"use_distributed_optimizer": True}},
    ),
    "uneven stages": (2, {"microbatches": 4}, {"parallel": stages(2), "config": UNEVEN}),
    "embedding counted": (
        2,
        {"microbatches": 4, "config": {"num_layers": 3}},
        {"parallel": stages(2), "config": EMBEDDING},
    ),
    # stages without layers: one stream in a message of n
    "the loss alone": (
        2,
        {"microbatches": 4},
        {"parallel": stages(2), "config": layout("Etttt|L")},
    ),
    "the embedding alone, learned head": (
        2,
        {"microbatches": 4, "mhc": HEAD},
        {"parallel": stages(2), "config": layout("E|ttttL")},
    ),
    "both ends alone, delayed sites, bf16, interleaved": (
        2,
        {"microbatches": 4, "bf16": True, "mhc": DELAYED},
        {"parallel": VIRTUAL, "config": layout("E|tt|tt|L")},
    ),
    "both ends alone, one stage in the middle bare": (
        4,
        {"microbatches": 4},
        {"parallel": stages(4), "config": layout("E||tttt|L")},
    ),
    "the loss alone, variable lengths": (
        2,
        VARIABLE,
        {"parallel": stages(2), "config": VARIABLE["config"] | layout("Etttt|L")},
    ),
    "learned head": (2, {"microbatches": 4, "mhc": HEAD}, {"parallel": stages(2)}),
    "MoE": (2, {"microbatches": 4, "kind": "moe"}, {"parallel": stages(2)}),
    "block spec, interleaved": (2, {"microbatches": 4, "kind": "block"}, {"parallel": VIRTUAL}),
    "full recompute": (
        2,
        {"microbatches": 4, "config": FULL_RECOMPUTE},
        {"parallel": stages(2)},
    ),
    "ordinary model": (2, {"microbatches": 4, "mhc": None}, {"parallel": stages(2)}),
    "variable lengths": (2, VARIABLE, {"parallel": stages(2)}),
    "variable lengths, interleaved": (2, VARIABLE, {"parallel": VIRTUAL}),
    "variable lengths, streams recomputed": (
        2,
        {**VARIABLE, "mhc": {"recompute": 2}},
        {"parallel": stages(2)},
    ),
    # each rank's one microbatch is one of the process's two: their gradients are added alike
    "DP=2, overlapped": (
        4,
        {"microbatches": 2},
        {
            "parallel": stages(2),
            "microbatches": 1,
            "ddp": {"overlap_grad_reduce": True, "use_distributed_optimizer": True},
        },
    ),
    "four stages": (4, {"microbatches": 4}, {"parallel": stages(4)}),
    # H_pre travels in columns behind the streams, in 16 bits in three of them: no bit is lost
    "delayed sites": (2, {"microbatches": 4, "mhc": DELAYED}, {"parallel": stages(2)}),
    "delayed sites, bf16, interleaved": (
        2,
        {"microbatches": 4, "bf16": True, "mhc": DELAYED},
        {"parallel": VIRTUAL},
    ),
    "delayed sites, full recompute, variable lengths": (
        2,
        {**VARIABLE, "config": VARIABLE["config"] | FULL_RECOMPUTE, "mhc": DELAYED},
        {"parallel": stages(2)},
    ),
}
ROUNDED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tied, fused": (
        2,
        {"optimizer": SGD, "microbatches": 4, "batch": 8},
        {"parallel": stages(2)},
    ),
    "TP=2 with sequence parallelism": (
        4,
        {"optimizer": SGD, "microbatches": 4, "batch": 8},
        {
            "parallel": stages(2, tensor_model_parallel_size=2),
            "config": {"sequence_parallel": True},
        },
    ),
    "TP=2 with sequence parallelism, delayed sites": (
        4,
        {"optimizer": SGD, "microbatches": 4, "batch": 8, "mhc": DELAYED},
        {
            "parallel": stages(2, tensor_model_parallel_size=2),
            "config": {"sequence_parallel": True},
        },
    ),
}
THOROUGH = (
    "variable lengths, streams recomputed",
    "delayed sites, full recompute, variable lengths",
    "TP=2 with sequence parallelism, delayed sites",
)


def results(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a case trains in its stages, and in one process; all of a size in one launch."""
    split: dict[int, dict[str, dict[str, Any]]] = {2: {}, 4: {}}
    # many cases share one
    alone: dict[str, dict[str, Any]] = {}
    alone_of: dict[str, str] = {}
    for table, common in ((CASES, EXACT), (ROUNDED, {})):
        for name in beside(case, table, THOROUGH):
            size, both, apart = table[name]
            alone_of[name] = json.dumps({**common, **both}, sort_keys=True)
            alone[alone_of[name]] = {**common, **both}
            split[size][name] = {**common, **both, **apart}
    size = (CASES | ROUNDED)[case][0]
    return run_scenarios(size, split[size])[case], run_scenarios(1, alone)[alone_of[case]]


@pytest.mark.parametrize("case", parameters(CASES, THOROUGH))
def test_stages_train_as_one_process_bit_for_bit(case: str) -> None:
    split, alone = results(case)
    assert_same_training(split, alone, bound=None)
    assert alone["losses"][-1] != alone["losses"][0]


@pytest.mark.parametrize("case", parameters(ROUNDED, THOROUGH))
def test_stages_train_as_one_process_up_to_summation_order(case: str) -> None:
    split, alone = results(case)
    assert_same_training(split, alone, bound=SUMMATION_ORDER)


@pytest.mark.parametrize(
    ("stages_", "more", "says"),
    [
        ("Etttt|L", {"drop": [3]}, "the model's last layer is gone"),
        ("E|ttttL", {"drop": [0]}, "the model's first layer is gone"),
    ],
)
def test_a_stage_without_layers_is_refused_with(
    stages_: str, more: dict[str, Any], says: str
) -> None:
    settings = {"config": layout(stages_), "parallel": stages(2), **more}
    with pytest.raises(AssertionError, match=says):
        run_scenarios(2, {"bad": settings})


@pytest.mark.parametrize("hidden", [[64, 64], [64, 128]], ids=["other bytes", "the same bytes"])
def test_stages_that_differ_in_width_are_refused(hidden: list[int]) -> None:
    streams = [{"num_streams": 4}, {"num_streams": 2}]
    settings = {"mhc_by_rank": streams, "hidden_by_rank": hidden, "tied": False}
    settings["parallel"] = stages(2)
    with pytest.raises(AssertionError, match="pipeline stages differ in what they exchange"):
        run_scenarios(2, {"bad": settings})


@pytest.mark.parametrize(
    "message",
    [{"seq_length": 64}, {"seq_length": 64, "micro_batch_size": 1}],
    ids=["other bytes", "the same bytes"],
)
def test_stages_that_differ_in_their_messages_are_refused(message: dict[str, int]) -> None:
    settings = {"message_by_rank": [{}, message], "parallel": stages(2)}
    with pytest.raises(AssertionError, match="pipeline stages differ in what they exchange") as bad:
        run_scenarios(2, {"bad": settings})
    micro = message.get("micro_batch_size", 2)
    said = str(bad.value).replace("\\", "")
    assert "stage 0: [(4, 64, 'torch.float32', 0, 32, None, 2)]" in said
    assert f"stage 1: [(4, 64, 'torch.float32', 0, 64, None, {micro})]" in said


@pytest.mark.parametrize("virtual", [False, True])
def test_stages_that_differ_in_evaluations_messages_alone_are_refused(virtual: bool) -> None:
    settings = {"evaluation_by_rank": [{}, {"micro_batch_size": 1}], "steps": 1, "evaluate": True}
    settings["parallel"] = VIRTUAL if virtual else stages(2)
    with pytest.raises(AssertionError, match="pipeline stages differ in what they exchange") as bad:
        run_scenarios(2, {"bad": settings})
    said = str(bad.value).replace("\\", "")
    assert re.search(r"stage 0: \[\(.*, 2\).*\]; stage 1: \[\(.*, 1\).*\]", said)


@pytest.mark.parametrize("send", ["send_forward", "send_backward"])
def test_a_plain_send_of_another_width_is_refused(send: str) -> None:
    """1F1B's warm-up and cool-down, which receive nothing in the same call."""
    config = TransformerConfig(
        num_layers=2, hidden_size=8, num_attention_heads=1, pipeline_dtype=torch.float32
    )
    mark_streams(config, MHCConfig(num_streams=4))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    registry.apply(pipeline_width_patch(message_width))
    try:
        plain_send = getattr(P2PCommunicator(dist.group.WORLD, config), send)
        with pytest.raises(ValueError, match=r"of shape \(16, 2, 8\).*expects \(16, 2, 32\)"):
            plain_send(torch.empty(16, 2, 8), False)
    finally:
        registry.undo("pipeline-width")
        dist.destroy_process_group()


def test_interleaved_stages_that_differ_in_length_beside_the_decoders_are_refused() -> None:
    """Its messages have `seq_length`, whatever the decoder's is."""
    message = {"decoder_seq_length": 32}
    settings = {"message_by_rank": [message, {**message, "seq_length": 64}], "parallel": VIRTUAL}
    with pytest.raises(AssertionError, match="pipeline stages differ in what they exchange"):
        run_scenarios(2, {"bad": settings})


def test_stages_that_tell_each_other_their_shapes_may_be_called_with_others() -> None:
    # Megatron wants this dispatcher for variable lengths, of a dense model too
    variable = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    settings = {"config": variable, "parallel": stages(2), "steps": 1}
    message = {"message_by_rank": [{}, {"seq_length": 64}]}
    trained = run_scenarios(2, {"alike": settings, "other": {**settings, **message}})
    assert_same_training(trained["other"], trained["alike"], bound=None)


def test_an_ordinary_model_with_the_configuration_of_one_with_mhc_is_refused() -> None:
    settings = {"mhc": None, "share_config": True, "parallel": stages(2)}
    with pytest.raises(AssertionError, match="this model has no mHC, but its TransformerConfig"):
        run_scenarios(2, {"bad": settings})


def test_a_second_model_with_the_same_settings_may_share_a_configuration() -> None:
    settings = {"share_config": True, "parallel": VIRTUAL, "steps": 1, "kind": "block"}
    assert run_scenarios(2, {"good": settings})["good"]["losses"]
