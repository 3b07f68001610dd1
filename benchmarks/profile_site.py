"""One site forward and backward, for a profiler: python benchmarks/profile_site.py [kernel tile].

ncu --clock-control none --set full -k regex:project_kernel python benchmarks/profile_site.py
"""

import sys

import torch
from tune_kernels import subjects

from megatron_mhc.kernels import triton_config as config

for item in sys.argv[1:]:
    kernel, numbers = item.split("=")
    tile = config.Tile(*map(int, numbers.split(",")))
    setattr(config, kernel, lambda *_, tile=tile: tile)
for call in subjects(8192, 4096).values():
    call()
torch.cuda.synchronize()
