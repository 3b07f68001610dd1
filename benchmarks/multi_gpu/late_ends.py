"""`examples/pretrain_gpt.py` with late outputs of a stage: what does not wait for them, shows.

    torchrun ... -m megatron_mhc.run benchmarks/multi_gpu/late_ends.py <flags> --mhc-overlap-p2p

A stage's last operation (`SideStreams.run_detached`) begins with some milliseconds of sleep.
"""

import runpy
from pathlib import Path
from typing import Any

import torch

from megatron_mhc.pipeline.side_streams import SideStreams

CYCLES = 5_000_000
run = SideStreams.run_detached


def late(self: SideStreams, work: Any, *inputs: Any) -> Any:
    """`SideStreams.run_detached`, its work behind a sleep."""

    def asleep(*given: Any) -> Any:
        torch.cuda._sleep(CYCLES)
        return work(*given)

    return run(self, asleep, *inputs)


SideStreams.run_detached = late  # type: ignore[method-assign]
pretrain = Path(__file__).parents[2] / "examples" / "pretrain_gpt.py"
runpy.run_path(str(pretrain), run_name="__main__")
