"""Run a program under PyTorch's CUDA sanitizer: two streams that touch a tensor without an order.

    python benchmarks/common/sanitize.py benchmarks/pipeline/overlap.py --spec local --equal 30
    python benchmarks/common/sanitize.py -m pytest -m gpu tests/gpu/test_recompute_gpu.py

The sanitizer sees every operator (ours take the traced way under it, see
`kernels.triton.torch_operator`) and knows a tensor by its address. Empty tensors all have the
address 0 and are left out.
"""

import runpy
import sys
from typing import Any

import torch
from torch.cuda import _sanitizer as sanitizer

_handle = sanitizer.ArgumentHandler._handle_argument


def _handle_what_has_memory(self: Any, value: Any, *rest: Any, **named: Any) -> None:
    if not (isinstance(value, torch.Tensor) and value.numel() == 0):
        _handle(self, value, *rest, **named)


def main() -> None:
    """Turn the sanitizer on and become the program of the command line."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    sanitizer.ArgumentHandler._handle_argument = _handle_what_has_memory  # type: ignore[method-assign]
    sanitizer.enable_cuda_sanitizer()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = sys.argv[0].rpartition("/")[0] or "."
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
