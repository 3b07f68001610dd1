"""`overlap_p2p`: the ends of a stage beside the compute stream, in another order of messages.

In CPU processes a stream is a name alone. What is shown here is the order of messages and the
arithmetic; `tests/gpu/test_overlap_gpu.py` shows the streams.
"""

from typing import Any

import pytest

from megatron_mhc.costs.recompute_plan import microbatches_in_flight
from tests.megatron.common.cases import beside, parameters
from tests.megatron.common.compare import assert_same_training
from tests.megatron.common.launch import run_scenarios
from tests.megatron.common.settings import DELAYED, FULL_RECOMPUTE, VIRTUAL, layout, stages

OVERLAP = {"overlap_p2p": True}
EAGER = {"overlap_p2p": True, "overlap_in_flight": 2}
COMMON: dict[str, Any] = {"evaluate": True, "batch": 12, "parallel": stages(2)}
SHARDED = {"overlap_grad_reduce": True, "use_distributed_optimizer": True}
# more microbatches than stages, and a layer a stage
FOUR: dict[str, Any] = {"microbatches": 4, "batch": 8}
SHORT: dict[str, Any] = {"config": {"num_layers": 2}}
# fewer, as many and more microbatches than stages; name: processes, settings of both runs
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 microbatch": (2, {"microbatches": 1}),
    "2 microbatches": (2, {**SHORT, "microbatches": 2}),
    "6 microbatches": (2, {"microbatches": 6}),
    "MoE": (2, {**FOUR, **SHORT, "kind": "moe"}),
    "dropout": (2, {**FOUR, "config": {"hidden_dropout": 0.1, "num_layers": 2}}),
    "full recompute": (2, {**FOUR, "config": FULL_RECOMPUTE}),
    # what is rebuilt ahead of a gradient is rebuilt while it is on its way
    "recompute of the streams": (2, {**FOUR, "mhc": {"recompute": 1}}),
    "interleaved, recompute of the streams": (
        2,
        {**FOUR, "parallel": VIRTUAL, "mhc": {"recompute": 1}},
    ),
    "delayed sites": (2, {**FOUR, "mhc": {**DELAYED, "recompute": 1}}),
    "interleaved, delayed sites": (2, {**FOUR, "parallel": VIRTUAL, "mhc": DELAYED}),
    "no deallocation": (
        2,
        {**FOUR, "config": {"deallocate_pipeline_outputs": False, "num_layers": 2}},
    ),
    "interleaved": (2, {"microbatches": 6, "parallel": VIRTUAL}),
    "four stages": (4, {"microbatches": 6, "parallel": stages(4)}),
    "four stages, 3 microbatches": (4, {"microbatches": 3, "parallel": stages(4)}),
    "TP=2 with sequence parallelism": (
        4,
        {
            **FOUR,
            "parallel": stages(2, tensor_model_parallel_size=2),
            "config": {"sequence_parallel": True, "num_layers": 2},
        },
    ),
    "DP=2, overlapped": (4, {**FOUR, **SHORT, "ddp": SHARDED}),
    "DP=2, gradients reduced together": (
        4,
        {**FOUR, **SHORT, "ddp": SHARDED, "align_grad_reduce": True},
    ),
    # a stage without layers: it takes one stream from a message, makes one, or hands it on
    "the embedding alone": (2, {**FOUR, "config": layout("E|ttttL")}),
    "the loss alone, delayed sites": (2, {**FOUR, "config": layout("Etttt|L"), "mhc": DELAYED}),
    "both ends alone, and one in between": (
        4,
        {"microbatches": 6, "parallel": stages(4), "config": layout("E|tt||ttL")},
    ),
    "both ends alone, one in front": (
        4,
        {"microbatches": 6, "parallel": stages(4), "config": layout("E||tttt|L")},
    ),
    "both ends alone, interleaved": (
        2,
        {
            **FOUR,
            "parallel": VIRTUAL,
            "config": layout("E|tt|tt|L"),
            "mhc": {"recompute": 1},
        },
    ),
    "one in between, interleaved": (
        2,
        {**FOUR, "parallel": VIRTUAL, "config": layout("Ett||tt|L")},
    ),
    "interleaved, as many microbatches as stages": (2, {"microbatches": 2, "parallel": VIRTUAL}),
    "interleaved, DP=2, gradients reduced together": (
        4,
        {**FOUR, "parallel": VIRTUAL, "ddp": SHARDED, "align_grad_reduce": True},
    ),
    "DP=2, parameters gathered late": (
        4,
        {**FOUR, **SHORT, "ddp": SHARDED | {"overlap_param_gather": True}},
    ),
}
EAGER_CASES = [
    "1 microbatch",
    "6 microbatches",
    "recompute of the streams",
    "delayed sites",
    "four stages",
    "four stages, 3 microbatches",
    "the embedding alone",
    "the loss alone, delayed sites",
    "both ends alone, and one in between",
]
THOROUGH = ("interleaved, delayed sites", "four stages, 3 microbatches")
ORDINARY = "z ordinary"


def results(case: str) -> dict[str, dict[str, Any]]:
    """What a case trains in stock order, with overlap and (where tried) with two in flight."""
    size = CASES[case][0]
    scenarios: dict[str, dict[str, Any]] = {}
    for name in beside(case, CASES, THOROUGH):
        processes, settings = CASES[name]
        if processes == size:
            modes = {"off": {}, "on": OVERLAP} | ({"eager": EAGER} if name in EAGER_CASES else {})
            for mode, mhc in modes.items():
                both = settings.get("mhc", {}) | mhc
                scenarios[f"{name}, {mode}"] = {**COMMON, **settings, "mhc": both}
    # the last of its processes: the patches of those before it are there
    scenarios[ORDINARY] = {**COMMON, "mhc": None}
    trained = run_scenarios(size, scenarios)
    return {mode: trained.get(f"{case}, {mode}", {}) for mode in ("off", "on", "eager")} | {
        "ordinary": trained[ORDINARY]
    }


@pytest.mark.parametrize("case", parameters(CASES, THOROUGH))
def test_overlap_trains_bit_for_bit_as_stock_order_does(case: str) -> None:
    result = results(case)
    assert_same_training(result["on"], result["off"], bound=None)


@pytest.mark.parametrize("case", ["6 microbatches", "interleaved"])
def test_a_model_that_has_been_trained_is_let_go(case: str) -> None:
    """What its pipeline keeps between steps holds the model, and nothing else may hold that."""
    assert [results(case)[mode]["models"] for mode in ("off", "on")] == [0, 0]


@pytest.mark.parametrize("case", parameters(EAGER_CASES, THOROUGH))
def test_two_in_flight_train_bit_for_bit_too(case: str) -> None:
    result = results(case)
    assert_same_training(result["eager"], result["off"], bound=None)


MEASURED = ("6 microbatches", "four stages", "four stages, 3 microbatches")


@pytest.mark.parametrize("case", parameters((*MEASURED, "interleaved"), THOROUGH))
def test_as_many_microbatches_are_in_flight_as_memory_is_planned_for(case: str) -> None:
    processes, settings = CASES[case]
    chunks = settings.get("parallel", {}).get("virtual_pipeline_model_parallel_size", 1)
    for mode, ahead in (("off", 1), ("on", 1), ("eager", 2)):
        if trained := results(case)[mode]:
            planned = [
                microbatches_in_flight(stage, processes, chunks, group=processes, ahead=ahead)
                for stage in range(processes)
            ]
            most = settings["microbatches"] * chunks
            assert trained["in_flight"] == [min(number, most) for number in planned]


@pytest.mark.parametrize("case", parameters(MEASURED, THOROUGH))
def test_the_schedule_with_overlap_is_the_one_that_runs(case: str) -> None:
    """The first stage's messages: each schedule has its own."""
    result = results(case)
    microbatches = CASES[case][1]["microbatches"]
    steps = 2
    for mode in ("on", "eager"):
        used = {name: number for name, number in result[mode]["messages"].items() if number}
        # a send forward for each microbatch, evaluated ones too; a receive for each gradient; and
        # a first small message over each link
        assert used == {
            "send_forward_recv_forward": (steps + 1) * microbatches + 1,
            "send_backward_recv_backward": steps * microbatches + 1,
        }
        assert result[mode]["side_streams"] == {
            "run_detached": (steps + 1) * microbatches,
            "run_and_join": 0,
        }
    assert result["off"]["messages"]["send_forward_recv_forward"] == 0
    assert result["off"]["side_streams"] == {"run_detached": 0, "run_and_join": 0}


@pytest.mark.parametrize("case", ["6 microbatches", "four stages"])
def test_hosts_that_wait_for_every_message_do_not_lock(case: str) -> None:
    """What locks ends by the launcher's limit of time."""
    processes, settings = CASES[case]
    waiting = {
        mode: {**COMMON, **settings, "mhc": mhc, "hosts_wait": True}
        for mode, mhc in {"on": OVERLAP, "eager": EAGER}.items()
    }
    for result in run_scenarios(processes, waiting).values():
        assert_same_training(result, results(case)["off"], bound=None)


@pytest.mark.parametrize(
    ("silent", "sentence"),
    [
        ("link", r"the link between pipeline stages 0 \(rank 0\) and 1 \(rank 1\) to connect"),
        pytest.param(
            "rank",
            "every rank of the job to begin its first step with --mhc-overlap-p2p",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_who_waits_for_ever_says_for_what(
    monkeypatch: pytest.MonkeyPatch, silent: str, sentence: str
) -> None:
    monkeypatch.setenv("MEGATRON_MHC_CONNECT_SECONDS", "3")
    with pytest.raises(AssertionError, match=f"rank 0 has waited 3 seconds for {sentence}"):
        run_scenarios(2, {"silent": {**COMMON, "mhc": OVERLAP, "silent": silent}})


def test_every_rank_makes_every_pipelines_group_in_one_order() -> None:
    """PyTorch names a group by how many were made before it: where ranks differ, they lock."""
    both = results("DP=2, overlapped")
    for on, off in zip(both["on"]["groups"], both["off"]["groups"], strict=True):
        assert on == [*off, [0, 2], [1, 3]]


def test_gradients_are_reduced_when_the_schedule_says_so() -> None:
    """Of two stages the last: the first one's are reduced as they come, in its last backward."""
    steps = 2
    one = results("DP=2, gradients reduced together")
    assert one["on"]["reduced"] == one["off"]["reduced"] == [0, 0, steps, steps]
    two = results("interleaved, DP=2, gradients reduced together")
    assert two["on"]["reduced"] == two["off"]["reduced"] == [2 * steps] * 4
    assert results("DP=2, overlapped")["on"]["reduced"] == [0] * 4


def test_the_ends_of_interleaved_chunks_run_on_side_streams() -> None:
    result = results("interleaved")
    # of the first stage's two chunks, both send and one receives
    assert result["on"]["side_streams"] == {"run_detached": 2 * 3 * 6, "run_and_join": 3 * 6}
    assert result["off"]["side_streams"] == {"run_detached": 0, "run_and_join": 0}


def test_an_ordinary_model_keeps_megatrons_schedule() -> None:
    ordinary = results("6 microbatches")["ordinary"]
    assert ordinary["messages"]["send_forward_recv_backward"] > 0
    assert ordinary["messages"]["send_forward_recv_forward"] == 0


def test_stages_that_differ_in_overlap_are_refused() -> None:
    settings = {"mhc_by_rank": [OVERLAP, {}], "parallel": stages(2)}
    with pytest.raises(AssertionError, match="pipeline stages differ in what they exchange"):
        run_scenarios(2, {"bad": settings})


def test_one_stage_has_nothing_to_overlap() -> None:
    with pytest.raises(AssertionError, match="one stage has nobody to exchange anything with"):
        run_scenarios(1, {"bad": {"mhc": OVERLAP}})
