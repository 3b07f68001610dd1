"""`examples/pretrain_gpt.py` with the sites fused that graphs of the router, or EP overlap, leave.

    torchrun ... -m megatron_mhc.run benchmarks/multi_gpu/cut_layers.py <flags> --mhc

No site is fused across layers, and none inside a dense layer: the run in stock order, without
graphs, that has the very roundings of those.
"""

import runpy
import sys
from pathlib import Path

PRETRAIN = Path(__file__).resolve().parents[2] / "examples" / "pretrain_gpt.py"


def cut_layers() -> None:
    """Replace the two questions that a layer asks when it is built."""
    from megatron_mhc.model import layer

    layer.runs_on_into_the_next = lambda config: False
    layer.is_one_region = lambda config, is_moe: is_moe


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__)
    else:
        cut_layers()
        runpy.run_path(str(PRETRAIN), run_name="__main__")
