"""A CPU in the place of torch's CUDA device: inside the scope, who asks for CUDA gets the CPU."""

import collections
import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed
import torch.utils._device
from torch.utils.data.dataloader import _BaseDataLoaderIter

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


class Stream:
    """A CPU works in order: every stream is the one there is, and waiting for it takes no time."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._outer: list[Any] = []

    def __enter__(self) -> Self:
        self._outer.append(_machine.stream)
        _machine.stream = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _machine.stream = self._outer.pop()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event


class Event:
    """Remembers when it was recorded; whatever came before it is done by then."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds: float | None = None

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end_event: "Event") -> float:
        """Milliseconds from this event to the other."""
        if self._seconds is None or end_event._seconds is None:
            raise RuntimeError("both events must be recorded before their time is taken")
        return (end_event._seconds - self._seconds) * 1e3

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        return True


@dataclass
class _Machine:
    """What the program last chose."""

    device: int = 0
    stream: Any = None
    default_stream: Stream = field(default_factory=Stream)


_machine = _Machine()


@dataclass(frozen=True)
class DeviceProperties:
    """What Megatron asks of a device.

    The capability is one that needs no CUDA_DEVICE_MAX_CONNECTIONS, which orders CUDA's kernels.
    """

    name: str = "cpu"
    major: int = 10
    minor: int = 0
    total_memory: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    multi_processor_count: int = os.cpu_count() or 1


class _Device(contextlib.nullcontext[None]):
    """`with torch.cuda.device(...)`: there is one device."""

    def __init__(self, device: Any) -> None:
        super().__init__()


def _answer(name: str, make: Callable[[], Any]) -> Callable[..., Any]:
    # a new function for each name: leaving must tell them apart
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return make()

    stand_in.__name__ = name
    return stand_in


def _impossible(name: str) -> Callable[..., Any]:
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"torch.cuda.{name} has no CPU stand-in")

    stand_in.__name__ = name
    return stand_in


def _set_device(device: Any) -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    _machine.device = index or 0


def _device_count() -> int:
    # a device for each process that the launcher started here
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _set_stream(stream: Any) -> None:
    _machine.stream = stream


@contextlib.contextmanager
def _stream(stream: Any) -> Iterator[None]:
    with stream if stream is not None else contextlib.nullcontext():
        yield


def _get_rng_state(device: Any = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    torch.set_rng_state(new_state)


def _seed(seed: int) -> None:
    # not torch.manual_seed: that one calls torch.cuda.manual_seed_all, which is this
    torch.default_generator.manual_seed(seed)


def _torch_cuda() -> dict[str, Any]:
    """What stands in for the names of torch.cuda."""
    properties = DeviceProperties()
    none = (
        "empty_cache init ipc_collect reset_accumulated_memory_stats reset_max_memory_allocated"
        " reset_peak_memory_stats synchronize"
    )
    zero = (
        "device_memory_used max_memory_allocated max_memory_reserved memory_allocated"
        " memory_reserved"
    )
    impossible = "CUDAGraph MemPool cudart graph graph_pool_handle make_graphed_callables"
    names: dict[str, Any] = {name: _answer(name, lambda: None) for name in none.split()}
    names |= {name: _answer(name, lambda: 0) for name in zero.split()}
    names |= {name: _impossible(name) for name in impossible.split()}
    answers: dict[str, Callable[[], Any]] = {
        "current_device": lambda: _machine.device,
        "current_stream": lambda: _machine.stream or _machine.default_stream,
        "default_stream": lambda: _machine.default_stream,
        "device_count": _device_count,
        "get_device_capability": lambda: (properties.major, properties.minor),
        "get_device_name": lambda: properties.name,
        "get_device_properties": lambda: properties,
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "initial_seed": torch.initial_seed,
        "is_available": lambda: True,
        "is_bf16_supported": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "is_initialized": lambda: True,
        "mem_get_info": lambda: (properties.total_memory, properties.total_memory),
        "memory_snapshot": list,
        "memory_stats": lambda: collections.defaultdict(int),
        "memory_summary": str,
    }
    names |= {name: _answer(name, make) for name, make in answers.items()}
    return names | {
        "Event": Event,
        "Stream": Stream,
        "default_generators": (torch.default_generator,) * _device_count(),
        "device": _Device,
        "get_rng_state": _get_rng_state,
        "manual_seed": _seed,
        "manual_seed_all": _seed,
        "set_device": _set_device,
        "set_rng_state": _set_rng_state,
        "set_stream": _set_stream,
        "stream": _stream,
    }


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


def replacements() -> list[tuple[Any, str, Any]]:
    """Everything that changes: where, under which name, and what stands there inside."""
    cuda, tensor, distributed = torch.cuda, torch.Tensor, torch.distributed
    nvtx = "mark range_end range_pop range_push range_start"
    changes: list[tuple[Any, str, Any]] = [
        (cuda, name, value) for name, value in _torch_cuda().items() if hasattr(cuda, name)
    ]
    changes += [(cuda.nvtx, name, _answer(name, lambda: 0)) for name in nvtx.split()]
    changes += [
        (cuda.nvtx, "range", _answer("range", contextlib.nullcontext)),
        (cuda.nccl, "version", _answer("version", lambda: (0, 0, 0))),
        (cuda.random, "get_rng_state", _get_rng_state),
        (cuda.random, "set_rng_state", _set_rng_state),
        (torch.accelerator, "is_available", _answer("is_available", lambda: False)),
        (torch.accelerator, "current_accelerator", _answer("current_accelerator", lambda: None)),
        (torch.accelerator, "device_count", _answer("device_count", lambda: 0)),
        (torch.accelerator, "current_device_index", _answer("current_device_index", lambda: 0)),
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
    mine = sys.modules[__name__]
    for module in [module for module in sys.modules.values() if module is not mine]:
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
            _machine.device, _machine.stream = 0, None
