"""`examples/pretrain_gpt.py` with late outputs of a stage: what does not wait for them, shows.

    torchrun ... -m megatron_mhc.run benchmarks/multi_gpu/late_ends.py <flags> --mhc-overlap-p2p

A stage's last operation (`SideStreams.run_detached`) begins with some milliseconds of sleep.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

PRETRAIN = Path(__file__).resolve().parents[2] / "examples" / "pretrain_gpt.py"
CYCLES = 5_000_000


def delay_stage_ends() -> None:
    """Put a sleep in front of what `SideStreams.run_detached` is given."""
    import torch

    from megatron_mhc.pipeline.side_streams import SideStreams

    run = SideStreams.run_detached

    def late(self: SideStreams, work: Any, *inputs: Any) -> Any:
        def asleep(*given: Any) -> Any:
            torch.cuda._sleep(CYCLES)
            return work(*given)

        return run(self, asleep, *inputs)

    SideStreams.run_detached = late  # type: ignore[method-assign]


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__)
    else:
        delay_stage_ends()
        runpy.run_path(str(PRETRAIN), run_name="__main__")
