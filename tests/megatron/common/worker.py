"""One process of the tests: trains a scenario at a time and tells what happened.

python -m tests.megatron.common.worker SCENARIOS_AS_JSON RESULT_FILE

What a launcher sets is in the environment: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import contextlib
import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.megatron.common.train import end_groups, train  # isort: skip  (first: Megatron, for the CPU)

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_mhc.pipeline.side_streams import SideStreams
from tests.megatron.common.probes import counted, groups_made, most_in_flight
from tests.megatron.common.rendezvous import hosts_wait
from tests.megatron.common.scenario import Scenario

MESSAGES = [
    *("recv_forward", "send_forward", "recv_backward", "send_backward"),
    *("send_forward_recv_backward", "send_backward_recv_forward"),
    *("send_forward_recv_forward", "send_backward_recv_backward"),
]


def run(s: Scenario) -> dict[str, Any]:
    """Build, train and describe a scenario.

    Returns:
        models (how many are still there when it has ended; `work` counts them),
        losses (one a step), mtp_losses (a list a step: of all its microbatches, by depth),
        parameters (whole, after training), gradients (of mHC's on this rank, a dict a step),
        dtypes and weight_decay (of each parameter, by name), and
        linked (for each layer but the last, whether its last site knows the next layer's first),
        calls (how often each connection ran for a microbatch, on average),
        messages (calls of each method of P2PCommunicator), side_streams (those of SideStreams),
        left (how many tensors of an interrupted step's graph are still there after it),
        in_flight (`most_in_flight`), reduced (calls of its chunks' `start_grad_sync`, by rank),
        groups (`groups_made`, by rank).
    """
    waits = hosts_wait() if s.hosts_wait else contextlib.nullcontext()
    with (
        waits,
        counted(P2PCommunicator, *MESSAGES) as messages,
        counted(SideStreams, "run_detached", "run_and_join") as side_streams,
        counted(DistributedDataParallel, "start_grad_sync") as reduced,
        most_in_flight() as in_flight,
        groups_made() as groups,
    ):
        result = train(s)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (reduced["start_grad_sync"], groups))
    counts = {"messages": messages, "side_streams": side_streams, "in_flight": in_flight}
    counts["reduced"], counts["groups"] = map(list, zip(*everywhere, strict=True))
    return result | counts


def work(one: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Run every scenario of the command line; rank 0 writes what `one` returned."""
    scenarios, result_file = sys.argv[1:]
    dist.init_process_group("gloo")
    results = {}
    for name, settings in json.loads(scenarios).items():
        results[name] = one(settings)
        dist.barrier()
        end_groups()
        # no isinstance: it asks a weak proxy's target, which may be gone
        results[name]["models"] = sum(type(thing) is GPTModel for thing in gc.get_objects())
    if dist.get_rank() == 0:
        torch.save(results, result_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    work(lambda settings: run(Scenario(**settings)))
