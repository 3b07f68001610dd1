"""Collectives in one go on a CPU: two dtypes, and done where they begin."""

from tests.megatron.common.launch import cold_python

PROGRAM = """
from megatron_mhc.patches import cpu

cpu.enter()
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer

dist.init_process_group("gloo", "tcp://127.0.0.1:0", rank=0, world_size=1)
given = [torch.arange(4.0), torch.arange(4.0).bfloat16(), torch.ones(3)]
got = [torch.empty_like(tensor) for tensor in given]
with param_and_grad_buffer._coalescing_manager(dist.group.WORLD, async_ops=True) as manager:
    for into, tensor in zip(got, given):
        dist.all_gather_into_tensor(into, tensor)
# without Megatron's wait: nothing of a gather goes on behind it
assert manager.works == [], manager.works
assert all(map(torch.equal, got, given)), got
manager.wait()
print("done")
"""


def test_two_dtypes_are_gathered_and_nothing_goes_on() -> None:
    finished = cold_python("-W", "ignore", "-c", PROGRAM)
    assert finished.stdout.splitlines()[-1:] == ["done"], finished.stdout[-3000:]
