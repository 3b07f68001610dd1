"""Parts of `overlap_p2p` without processes: which schedule runs, what streams are told."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_mhc.pipeline import connect, links, schedule
from megatron_mhc.pipeline.deadline import Deadline


def test_a_limit_that_is_no_number_of_seconds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_MHC_CONNECT_SECONDS", "soon")
    with pytest.raises(ValueError, match="is 'soon'; expected a number of seconds, above 0"):
        Deadline("rank 0")


def test_over_nccl_the_first_step_of_each_kind_is_in_stock_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "nccl")

    class Ours:
        def __init__(self, **arguments: Any) -> None: ...

        def run(self) -> str:
            return "ours"

    monkeypatch.setattr(schedule, "Overlapped1F1B", Ours)
    monkeypatch.setattr(schedule, "check_stages", lambda *_: None)
    connected: list[Any] = []
    monkeypatch.setattr(schedule, "two_directions", lambda group, config: connected.append(group))
    config = SimpleNamespace(mhc_overlap_in_flight=1)

    class Chunk(SimpleNamespace):
        __hash__ = object.__hash__

    first = Chunk(config=config)

    def run(forward_only: bool, **more: Any) -> Any:
        arguments = {
            "model": first,
            "forward_only": forward_only,
            "pg_collection": SimpleNamespace(pp="a group"),
            **more,
        }
        return schedule.run_overlapped("1F1B", lambda **arguments: "stock", arguments)

    assert run(False, p2p_communicator="a caller's own") == "ours"
    assert not connected
    assert [run(False), run(False), run(True), run(True)] == ["stock", "ours", "stock", "ours"]
    assert connected == ["a group"] * 4  # before the first step, though it is in stock order
    # another model's first step, with the same configuration
    assert run(False, model=Chunk(config=config)) == "stock"


def test_a_gradient_that_an_interleaved_chunk_sends_keeps_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The allocator is told who still reads it; what happens otherwise only GPUs show."""
    lent: list[Any] = []
    monkeypatch.setattr(links, "record_use", lambda values, stream: lent.append((values, stream)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "compute")
    monkeypatch.setattr(P2PCommunicator, "send_backward_recv_backward", lambda *sent: sent[1])
    communicator = object.__new__(links.SideStreamCommunicator)
    assert communicator.send_backward_recv_backward("gradient", False, None, True) == "gradient"
    assert communicator.send_backward_recv_backward(None, True, None, True) is None
    assert lent == [("gradient", "compute")]


def test_an_interleaved_output_that_megatron_sends_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In warm-up and evaluation it leaves from the compute stream, which has to wait for it."""
    done: list[Any] = []
    compute = SimpleNamespace(wait_stream=lambda stream: done.append(("waits", stream)))
    monkeypatch.setattr(links, "record_use", lambda values, stream: done.append(("lent", values)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute)
    monkeypatch.setattr(
        P2PCommunicator, "send_forward_recv_forward", lambda *sent: done.append(("sent", sent[1]))
    )
    communicator = object.__new__(links.SideStreamCommunicator)
    communicator.side_streams = SimpleNamespace(microbatch=0, of=lambda i: f"stream {i}")  # type: ignore[assignment]
    for output in ("y0", "y1"):
        communicator.send_forward_recv_forward(output, False, None)
    expected = [("waits", "stream 0"), ("lent", "y0"), ("sent", "y0")]
    assert done == [*expected, ("waits", "stream 1"), ("lent", "y1"), ("sent", "y1")]


def test_no_timer_of_megatrons_waits_for_a_message() -> None:
    config = SimpleNamespace(timers="Megatron's", batch_p2p_comm=True)
    assert connect.without_timers(config).timers is None
    assert config.timers == "Megatron's"


def test_distillations_shapes_have_no_place_in_our_schedule() -> None:
    with pytest.raises(ValueError, match="does not work with adjust_tensor_shapes_fn"):
        schedule.Overlapped1F1B(
            forward_step_func=None,  # type: ignore[arg-type]
            data_iterator=None,
            model=None,
            num_microbatches=1,
            seq_length=1,
            micro_batch_size=1,
            adjust_tensor_shapes_fn=lambda *shapes: shapes,
        )


def test_interleaved_chunks_take_no_communicator_of_a_callers_own() -> None:
    with pytest.raises(ValueError, match="makes the interleaved schedule's communicator itself"):
        schedule.interleaved(
            lambda **_: "stock", model=[SimpleNamespace(config="its")], p2p_communicator="one's own"
        )
