"""`examples/pretrain_gpt.py` with late outputs of a stage: what does not wait for them, shows.

    torchrun ... -m megatron_mhc.run benchmarks/late_ends.py <flags> --mhc-overlap-p2p

A stage's last operation (`Aside.run`) starts by some milliseconds of sleep on its stream.
"""

import runpy
from pathlib import Path
from typing import Any

import torch

from megatron_mhc.aside import Aside

CYCLES = 5_000_000
run = Aside.run


def late(self: Aside, work: Any, *inputs: Any) -> Any:
    """`Aside.run`, its work behind a sleep."""

    def asleep(*given: Any) -> Any:
        torch.cuda._sleep(CYCLES)
        return work(*given)

    return run(self, asleep, *inputs)


Aside.run = late  # type: ignore[method-assign]
pretrain = Path(__file__).parents[1] / "examples" / "pretrain_gpt.py"
runpy.run_path(str(pretrain), run_name="__main__")
