"""The model of a pipeline's step: Megatron's order, and closed forms where there are some."""

import pytest

from megatron_mhc.costs.schedule_model import Operation, Work, order, step_seconds

FORWARD, BACKWARD = 3.0, 5.0
BOTH = FORWARD + BACKWARD


def stages_of(stages: int, chunks: int = 1) -> list[list[Work]]:
    return [[Work(FORWARD / chunks, BACKWARD / chunks)] * chunks for _ in range(stages)]


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_1f1b_stage_has_no_more_in_flight_than_it_may(ahead: int) -> None:
    for stage in range(4):
        in_flight = most = 0
        for operation in order(stage, 4, 9, ahead=ahead):
            in_flight += 1 if operation.is_forward else -1
            most = max(most, in_flight)
        assert (in_flight, most) == (0, ahead * (3 - stage) + 1)


def test_the_interleaved_order_is_megatrons() -> None:
    """By hand: two stages of two chunks, four microbatches, the first stage."""
    forwards = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    found = order(0, 2, 4, chunks=2)
    assert [(o.chunk, o.microbatch) for o in found if o.is_forward] == forwards
    assert [o.is_forward for o in found[:4]] == [True] * 4
    backwards = [(1 - chunk, microbatch) for chunk, microbatch in forwards]
    assert [(o.chunk, o.microbatch) for o in found if not o.is_forward] == backwards
    assert found[5] == Operation(False, 1, 0)


@pytest.mark.parametrize(("stages", "chunks"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 3)])
def test_without_messages_a_step_has_its_work_and_its_bubble(stages: int, chunks: int) -> None:
    microbatches = 12
    bubble = (stages - 1) * BOTH / chunks
    for overlapped in (False, True):
        found = step_seconds(stages_of(stages, chunks), microbatches, 0.0, overlapped=overlapped)
        assert found == pytest.approx(microbatches * BOTH + bubble)


def test_the_slowest_stage_sets_the_pace() -> None:
    slow = [[Work(FORWARD, BACKWARD)], [Work(2 * FORWARD, 2 * BACKWARD)]]
    assert step_seconds(slow, 8, 0.0) == pytest.approx(8 * 2 * BOTH + BOTH)


def test_messages_cost_less_where_they_are_overlapped_and_least_with_two_in_flight() -> None:
    """In 1F1B a microbatch's way to the last stage and back is two messages a stage longer; the
    first of four stages shares that among its four in flight."""
    message, many = 1.0, 200
    work = stages_of(4)
    stock = step_seconds(work, many, message)
    one = step_seconds(work, many, message, overlapped=True)
    two = step_seconds(work, many, message, overlapped=True, ahead=2)
    assert (one - 4 * BOTH) / many == pytest.approx(BOTH + 2 * message * 3 / 4, rel=0.02)
    assert stock > one > two
    assert two == pytest.approx(many * BOTH + 3 * BOTH + 6 * message)


def test_what_cannot_end_is_refused() -> None:
    with pytest.raises(ValueError, match="end in a deadlock"):
        step_seconds(stages_of(4, 2), 5, 0.0, group=1)
