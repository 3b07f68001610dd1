"""A GPU's driver without a GPU: what Triton compiles for a card, and what it would launch."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.compiler import CompiledKernel
from triton.runtime import driver

from megatron_mhc.kernels import Mixing, triton
from megatron_mhc.kernels.triton import launch, tiles
from tests.kernel_cases import CARDS, inputs, run


def modules() -> dict[str, Any]:
    """The modules of `kernels.triton`, by their names in it."""
    prefix = f"{triton.__name__}."
    return {
        module.name.removeprefix(prefix): importlib.import_module(module.name)
        for module in pkgutil.walk_packages(triton.__path__, prefix)
        if not module.ispkg
    }


launched: list[Any] = []
"""What was given to the driver below."""


class Launcher:
    """Where Triton's C code would launch."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, *arguments: Any) -> None:
        """Keep them."""
        launched.append((self.name, *arguments))


class Utilities:
    """What a compiled kernel asks of the driver before its first launch."""

    def __init__(self, shared_memory: int) -> None:
        self.shared_memory = shared_memory

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        """Module, function, registers, spills, and threads, where this Triton wants to know."""
        threads = "n_max_threads" in CompiledKernel._init_handles.__code__.co_names
        return (1, 2, 0, 0, 1024) if threads else (1, 2, 0, 0)

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Triton refuses a kernel that wants more."""
        return {"max_shared_mem": self.shared_memory}

    def unload_module(self, module: int) -> None:
        """There is none."""


class Driver(GPUDriver):
    """The compiler of a card, an H100 where nothing else is said."""

    def __init__(self, capability: int = 90, shared_memory: int = 232_448) -> None:
        self.capability = capability
        self.utils, self.launcher_cls = Utilities(shared_memory), Launcher
        self.get_current_device = lambda: capability  # Triton keeps a device's target
        self.get_current_stream = lambda device: 7

    def get_current_target(self) -> GPUTarget:
        """What it compiles for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")

    @staticmethod
    def is_active() -> bool:
        """Always."""
        return True

    def map_python_to_cpp_type(self, name: str) -> str:
        """Asked for by the launcher in C."""
        return name

    get_device_interface = get_benchmarker = clear_cache = None
    get_empty_cache_for_benchmark = None


def active() -> tuple[Any, str]:
    """Where Triton keeps its driver: an object and the attribute's name (`active` up to 3.3)."""
    return driver, "_active" if hasattr(driver, "_active") else "active"


def use_card(name: str, put: Callable[[Any, str, Any], None]) -> None:
    """Have the tiles and the compiler of this card (in CARDS); put: `setattr`, or one that is
    undone later."""
    capability, shared_memory, multiprocessors = CARDS[name]
    put(tiles, "architecture", lambda: f"sm_{capability}")
    put(tiles, "shared_memory", lambda: shared_memory)
    put(tiles, "multiprocessors", lambda: multiprocessors)
    for kernel in tiles.TUNABLE:
        # without what is kept of another card
        put(tiles, kernel, tiles.TUNABLE[kernel].__wrapped__)
    put(*active(), Driver(capability, shared_memory))
    launch.forget()


def call(operation: str, n: int, dtype: torch.dtype, width: int = 4096) -> None:
    """Launch all that an operation launches, forward and backward, for one token."""
    given = inputs(
        "combine_pre" if operation == "rebuild" else operation, 1, n, width, dtype, "cpu"
    )
    function = getattr(modules()["operations"], operation)
    if operation == "rebuild":
        x, f, h_post, h_res = (given[name].detach() for name in ("x", "f", "h_post", "h_res"))
        function(x, [h_post] * 6, [Mixing(f, h_post, h_res, f[0])] * 5)
        return
    for name in ("f_bias", None):
        out = run(function, given)
        torch.autograd.backward(out, [torch.ones_like(result) for result in out])
        if given.pop(name, None) is None:
            return
