"""What mHC adds to a step by `step_costs`, against steps that were measured."""

import pytest

from megatron_mhc.costs.kernel_passes import CARDS, Kind, site
from megatron_mhc.costs.step_costs import Estimate, Run, estimate

WIDTH, FFN, SEQUENCE, VOCABULARY = 4096, 14336, 4096, 8192
LAYER = 2 * (2.5 * WIDTH * WIDTH + 3 * WIDTH * FFN + SEQUENCE * WIDTH)
"""FLOPs a token forward: projections with a quarter of keys and values, SwiGLU, causal attention.
"""
NVLINK = 150.0


def dense(stages: int, micro_batch: int, microbatches: int) -> Run:
    """8 layers of the model that the reports measure."""
    tokens = micro_batch * SEQUENCE
    return Run(
        tokens=tokens, width=WIDTH, kind=Kind("bf16", 4), sublayers=[[16 // stages]] * stages,
        flops=LAYER / 2 * tokens, last=2 * WIDTH * VOCABULARY * tokens, backward=2.0,
        microbatches=microbatches, group=stages, hosted=True,
    )  # fmt: skip


def paper(micro_batch: int) -> Run:
    """8 of the paper's layers, 12 experts, of `benchmarks/model/layers.py --moe`; FLOPs by their
    weights alone: attention 4.5 C*C, a shared expert of 3072 and six of 1536."""
    tokens, width = micro_batch * SEQUENCE, 2560
    layer = 2 * tokens * (4.5 * width * width + 3 * width * (3072 + 6 * 1536))
    return dense(1, micro_batch, 1)._replace(width=width, flops=layer / 2, last=0.0)


ONE = (dense(1, 2, 1), "H100", 0.175)
TWO = (dense(2, 1, 16), "H100", 0.922)
FOUR = (dense(4, 1, 16), "H200", 0.664)


def rate_of_one() -> float:
    """The MFU of these layers where no pipeline is in the way; an H200 has an H100's rate."""
    run, card, ordinary = ONE
    return estimate(run, CARDS[card], NVLINK, None, ordinary).mfu


@pytest.mark.parametrize(
    ("run", "card", "ordinary", "what", "measured"),
    [
        (*ONE, "messages", 0.1918),
        (*ONE[:2], 0.1803, "messages", 0.1966),
        (ONE[0], "H200", 0.1715, "messages", 0.1871),
        (paper(4), "H200", 0.2908, "messages", 0.3083),
        (*TWO, "messages", 1.000),
        (*TWO, "overlap", 1.036),
        (*FOUR, "messages", 0.742),
        (*FOUR, "overlap", 0.659),
        (*FOUR, "in_flight", 0.581),
    ],
)
def test_the_model_is_near_what_was_measured(
    run: Run, card: str, ordinary: float, what: str, measured: float
) -> None:
    """What the ordinary step takes longer than at one GPU's rate, it stops for at its messages."""
    mfu = rate_of_one() if len(run.sublayers) > 1 else None
    found = estimate(run, CARDS[card], NVLINK, mfu, ordinary)
    assert found.ordinary == pytest.approx(ordinary, rel=1e-6)
    assert getattr(found, what) == pytest.approx(measured, rel=0.15)
    # and near it as what mHC adds, not as a step of which it is a tenth
    if what == "messages":
        assert getattr(found, what) - ordinary == pytest.approx(measured - ordinary, rel=0.5)


def test_a_step_alone_says_the_rate_and_leaves_messages_their_bytes() -> None:
    run, card, ordinary = FOUR
    found = estimate(run, CARDS[card], NVLINK, None, ordinary)
    assert found.ordinary == pytest.approx(ordinary, rel=1e-6)
    assert found.mfu < 0.7 * rate_of_one()
    assert found.message[0] == pytest.approx(20e-6 + 2 * 4096 * 4096 / 150e9)


@pytest.mark.parametrize(("run", "ordinary"), [(FOUR[0], 0.3), (ONE[0], 0.5)], ids=["fast", "one"])
def test_a_step_that_messages_do_not_explain_is_refused(run: Run, ordinary: float) -> None:
    with pytest.raises(ValueError, match=r"takes at least .* without --mfu"):
        estimate(run, CARDS["H100"], NVLINK, 0.5, ordinary)


def test_over_slow_links_overlap_helps_and_two_in_flight_more() -> None:
    found = estimate(dense(4, 2, 12), CARDS["H100"], 25.0, 0.5)
    assert found.messages > found.launches >= found.kernels > found.ordinary
    assert found.messages > 1.02 * found.overlap > 1.1 * found.in_flight
    # of the three, the last alone leaves little of the messages
    assert found.in_flight == pytest.approx(found.launches, rel=0.1)


def test_a_site_takes_its_passes_and_never_less_than_the_least() -> None:
    of_4096 = site(CARDS["H100"], 8192, 4096)
    assert sum(of_4096) == pytest.approx(1056e-6, rel=0.01)
    # measured 1770: wide streams take fewer passes
    assert sum(site(CARDS["H100"], 8192, 7168)) == pytest.approx(1848e-6, rel=0.01)
    assert sum(site(CARDS["H100"], 16, 4096)) == pytest.approx(205e-6)


@pytest.mark.parametrize(
    ("card", "kind", "us"),
    [
        ("H200", ("bf16", 1), 367),
        ("H200", ("bf16", 2), 495),
        ("H200", ("bf16", 4), 899),
        ("H100", ("bf16", 8), 6235),
        ("H200", ("fp16", 4), 1605),
        ("H200", ("fp16", 2), 712),
        ("H200", ("fp32", 4), 2327),
        ("H200", ("bf16", 4, True), 777),
        ("H100", ("bf16", 4, True), 881),
        ("H200", ("fp32", 2, True), 984),
        # not timed: n 8 has the H100's passes there, fp16 n 4's ratio, 3 and 16 their traffic
        ("H200", ("bf16", 8), 4413),
        ("H200", ("fp16", 8), 7799),
        ("H200", ("bf16", 8, True), 3815),
        ("H200", ("bf16", 3), 713),
        ("H200", ("bf16", 16), 3116),
    ],
)
def test_kernels_are_those_of_the_streams_and_their_dtype(
    card: str, kind: tuple, us: float
) -> None:
    assert sum(site(CARDS[card], 8192, 4096, Kind(*kind))) == pytest.approx(us * 1e-6, rel=0.01)


@pytest.mark.parametrize("kind", [Kind("bf16", 8), Kind("fp32", 2), Kind("bf16", 4, True)])
def test_a_step_has_the_kernels_and_the_messages_of_its_kind(kind: Kind) -> None:
    run = dense(2, 2, 1)._replace(kind=kind, hosted=False)  # one microbatch: through both stages
    found = estimate(run, CARDS["H100"], NVLINK, 0.5)
    sites = 16 * sum(site(CARDS["H100"], run.tokens, WIDTH, kind))
    assert found.kernels - found.ordinary == pytest.approx(sites)
    wide, narrow = found.message[1] - 20e-6, found.message[0] - 20e-6
    assert wide == pytest.approx(kind.n * narrow)
    assert narrow == pytest.approx(run.tokens * WIDTH * (4 if kind.dtype == "fp32" else 2) / 150e9)


def test_small_microbatches_are_bound_by_the_host_and_graphs_are_not() -> None:
    small = dense(1, 1, 8)._replace(tokens=256, flops=LAYER / 2 * 256, last=0.0)
    hosted = estimate(small, CARDS["H100"], NVLINK, 0.5)
    graphed = estimate(small._replace(hosted=False), CARDS["H100"], NVLINK, 0.5)
    assert hosted.launches - hosted.kernels == pytest.approx(8 * 16 * 701e-6)
    assert graphed.launches == graphed.kernels < hosted.kernels


def test_a_step_faster_than_the_card_is_refused() -> None:
    with pytest.raises(ValueError, match="faster than the model allows"):
        estimate(dense(1, 2, 1), CARDS["H100"], NVLINK, None, 0.02)


def test_one_stage_sends_nothing() -> None:
    found = estimate(dense(1, 2, 4), CARDS["H100"], 1e-3, 0.5)
    assert isinstance(found, Estimate) and found.messages == found.launches == found.overlap
