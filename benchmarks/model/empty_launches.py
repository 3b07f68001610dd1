"""A CPU in the place of a GPU whose launches take no time: operations do all else that they do."""

import ctypes
from typing import Any

import torch

from megatron_mhc.kernels import backend
from megatron_mhc.kernels.triton import launch, tiles
from megatron_mhc.patches.cpu.torch_cuda import METHODS

TO_SUBLAYERS = {
    "aggregate_kernel": "u_ptr",
    "stream_gradients_kernel": "df_ptr",
    "combine_gradients_kernel": "df_ptr",
}
"""Which tensor of a kernel goes on to a sublayer, or back to it: u, and the gradient of f."""
FIRST_ADDRESS = 9
"""Of the arguments of `launch.Compiled.run`."""


class Empty:
    """Launches that are empty calls, on a CPU: how many there were, by kernel.

    What goes on to sublayers becomes zero: with what memory happens to hold a CPU can be slow.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def through_triton(self, kernel: Any, _: Any, arguments: Any, *__: Any) -> launch.Compiled:
        """In the place of `launch.through_triton`."""
        name = kernel.fn.__name__
        of = TO_SUBLAYERS.get(name)
        place = None if of is None else kernel.arg_names.index(of)
        made = None if place is None else arguments[place]
        size = 0 if made is None else made.nbytes

        def run(*whole: Any) -> None:
            self.counts[name] = self.counts.get(name, 0) + 1
            if size:
                ctypes.memset(whole[FIRST_ADDRESS + place], 0, size)

        if made is not None:
            made.zero_()
        self.counts[name] = self.counts.get(name, 0) + 1
        return launch.Compiled(run, None, None, lambda: None, lambda _: 0)


def without_launches() -> Empty:
    """From now on operations on the CPU's tensors do all that they do on a GPU, but launch."""
    empty = Empty()
    launch.through_triton = empty.through_triton
    backend.why_not_triton = lambda *_: None
    tiles.architecture, tiles.multiprocessors = (lambda: "sm_90"), (lambda: 132)
    tiles.shared_memory = lambda: 232_448
    return empty


def without_wrappers() -> None:
    """Take the stand-in for CUDA off what our operations make tensors with: its Python would count.

    Megatron keeps what it makes by these names on CUDA, from the first step on.
    """
    for owner, names in ((torch, "empty empty_like"), (torch.Tensor, METHODS)):
        for name in names.split():
            if original := getattr(getattr(owner, name, None), "__wrapped__", None):
                setattr(owner, name, original)
