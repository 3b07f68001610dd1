"""A CPU in the place of torch's CUDA device: inside the scope, who asks for CUDA gets the CPU."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
import torch.utils._device
from torch.utils.data.dataloader import _BaseDataLoaderIter

from . import cuda_names

FACTORIES = (
    "arange as_tensor asarray bartlett_window blackman_window empty empty_like empty_permuted"
    " empty_quantized empty_strided eye from_file full full_like hamming_window hann_window"
    " kaiser_window linspace logspace ones ones_like rand rand_like randint randint_like randn"
    " randn_like randperm range scalar_tensor sparse_bsc_tensor sparse_bsr_tensor"
    " sparse_compressed_tensor sparse_coo_tensor sparse_csc_tensor sparse_csr_tensor tensor"
    " tril_indices triu_indices zeros zeros_like"
)
"""Functions of torch that take `device=`; a version may lack some."""

METHODS = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros"
"""Methods of a tensor that take `device=`."""


def on_cpu(device: Any) -> Any:
    """The CPU where CUDA is meant (a bare number means it too); any other device as it is."""
    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cpu")
    if isinstance(device, str | torch.device) and str(device).startswith("cuda"):
        return torch.device("cpu")
    return device


def over_gloo(backend: Any) -> Any:
    """Gloo where the backend is NCCL, or is left to torch to choose; any other as it is."""
    return "gloo" if backend is None or "nccl" in str(backend).lower() else backend


def _making(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes `device=`, making its tensor on the CPU, where nothing is pinned."""

    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return make


def _moving(original: Callable[..., Any]) -> Callable[..., Any]:
    """`tensor.to` and `module.to`, where the device comes first or by name."""

    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = on_cpu(kwargs["device"])
        return original(self, *map(on_cpu, args[:1]), *args[1:], **kwargs)

    return to


def _staying(name: str) -> Callable[..., Any]:
    """A method that moves, or orders, what is already where it should be."""

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    stay.__name__ = name
    return stay


def _typed(original: Callable[..., Any]) -> Callable[..., Any]:
    """`tensor.type`, with CUDA's names: Megatron's optimizer and gradient clipping ask for them."""

    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], str):
            args = (args[0].replace("torch.cuda.", "torch."), *args[1:])
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    return type_


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.load`, to the CPU unless a function or a table says where."""

    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return original(f, on_cpu(map_location or "cpu"), *args, **kwargs)

    return load


def _gloo_start(original: Callable[..., None]) -> Callable[..., None]:
    """`init_process_group`, over gloo and bound to no device."""

    @functools.wraps(original)
    def init_process_group(
        backend: Any = None, *args: Any, device_id: Any = None, **kwargs: Any
    ) -> None:
        original(over_gloo(backend), *args, **kwargs)

    return init_process_group


def _gloo_group(original: Callable[..., Any]) -> Callable[..., Any]:
    """`new_group`, over gloo where NCCL is named."""

    @functools.wraps(original)
    def new_group(*args: Any, backend: Any = None, device_id: Any = None, **kwargs: Any) -> Any:
        return original(*args, backend=backend and over_gloo(backend), **kwargs)

    return new_group


def _barrier(original: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.distributed.barrier` without device_ids, which gloo refuses."""

    @functools.wraps(original)
    def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return original(group=group, async_op=async_op)

    return barrier


def _own_seed(original: Callable[..., None]) -> Callable[..., None]:
    """A data loader's start, which draws a seed: on CUDA that leaves the device's generator alone.

    Else a resumed run, which makes its loaders after it loaded the generator's state, would drop
    out other activations than the run that it goes on with.
    """

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            original(self, *args, **kwargs)

    return init


def _device_context(original: Callable[..., Any]) -> Callable[..., Any]:
    """`with torch.device(...)`, entered for the CPU."""

    @functools.wraps(original)
    def init(self: Any, device: Any) -> None:
        original(self, on_cpu(device))

    return init


def _generators(original: Any) -> Any:
    """`torch.Generator`, which makes the CPU's; every generator is an instance of it still."""

    class IsInstance(type(original)):  # type: ignore[misc]
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, original)

    class Generator(original, metaclass=IsInstance):
        def __new__(cls, device: Any = None) -> Any:
            return original("cpu" if device is None else on_cpu(device))

    return Generator


def replacements() -> list[tuple[Any, str, Any]]:
    """Everything that changes: where, under which name, and what stands there inside."""
    cuda, tensor, distributed = torch.cuda, torch.Tensor, torch.distributed
    nvtx = "mark range_end range_pop range_push range_start"
    changes: list[tuple[Any, str, Any]] = [
        (cuda, name, value)
        for name, value in cuda_names.cuda_names().items()
        if hasattr(cuda, name)
    ]
    changes += [(cuda.nvtx, name, cuda_names.answer(name, lambda: 0)) for name in nvtx.split()]
    changes += [
        (cuda.nvtx, "range", cuda_names.answer("range", contextlib.nullcontext)),
        (cuda.nccl, "version", cuda_names.answer("version", lambda: (0, 0, 0))),
        (cuda.random, "get_rng_state", cuda_names.get_rng_state),
        (cuda.random, "set_rng_state", cuda_names.set_rng_state),
        (torch.accelerator, "is_available", cuda_names.answer("is_available", lambda: False)),
        (
            torch.accelerator,
            "current_accelerator",
            cuda_names.answer("current_accelerator", lambda: None),
        ),
        (torch.accelerator, "device_count", cuda_names.answer("device_count", lambda: 0)),
        (
            torch.accelerator,
            "current_device_index",
            cuda_names.answer("current_device_index", lambda: 0),
        ),
    ]
    changes += [
        (torch, name, _making(getattr(torch, name)))
        for name in FACTORIES.split()
        if hasattr(torch, name)
    ]
    changes += [(tensor, name, _making(getattr(tensor, name))) for name in METHODS.split()]
    changes += [(tensor, name, _staying(name)) for name in ("cuda", "pin_memory", "record_stream")]
    changes += [
        (tensor, "to", _moving(tensor.to)),
        (tensor, "type", _typed(tensor.type)),
        (torch.nn.Module, "to", _moving(torch.nn.Module.to)),
        (torch.nn.Module, "cuda", _staying("cuda")),
        (torch, "load", _loading(torch.load)),
        (torch, "Generator", _generators(torch.Generator)),
        (
            _BaseDataLoaderIter,
            "__init__",
            _own_seed(_BaseDataLoaderIter.__init__),
        ),
        (
            torch.utils._device.DeviceContext,
            "__init__",
            _device_context(torch.utils._device.DeviceContext.__init__),
        ),
    ]
    if distributed.is_available():
        changes += [
            (distributed, "init_process_group", _gloo_start(distributed.init_process_group)),
            (distributed, "new_group", _gloo_group(distributed.new_group)),
            (distributed, "barrier", _barrier(distributed.barrier)),
        ]
    return changes


_ABSENT = object()


def _put(owner: Any, name: str, value: Any) -> Any:
    """Set an attribute; returns what the owner itself held, so that inherited names go again."""
    held = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    return held


def _put_back(owner: Any, name: str, held: Any) -> None:
    if held is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, held)


def _forget(stand_ins: dict[int, Any]) -> None:
    """Put originals where a module, imported inside, took a stand-in by name."""
    ours = (sys.modules[__name__], cuda_names)
    for module in [module for module in sys.modules.values() if module not in ours]:
        for name, value in tuple(getattr(module, "__dict__", {}).items()):
            if id(value) in stand_ins:
                setattr(module, name, stand_ins[id(value)])


@contextlib.contextmanager
def cuda_is_cpu() -> Iterator[None]:
    """Inside, torch says that it has CUDA, and all that goes there goes to the CPU.

    Tensors, modules, generators and process groups asked for on CUDA or NCCL are the CPU's and
    gloo's, also on a machine that has a GPU. `torch.compile` runs its functions as they are.
    """
    # torch remembers its factories at the first use of this: they must be its own
    torch.utils._device._device_constructors()
    changes = replacements()
    stand_ins = {id(value): getattr(owner, name) for owner, name, value in changes}
    held: list[tuple[Any, str, Any]] = []
    with torch.compiler.set_stance("force_eager"):
        try:
            for owner, name, value in changes:
                held.append((owner, name, _put(owner, name, value)))
            yield
        finally:
            for owner, name, original in reversed(held):
                _put_back(owner, name, original)
            _forget(stand_ins)
            cuda_names.machine.device, cuda_names.machine.stream = 0, None
