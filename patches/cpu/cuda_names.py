"""The names of torch.cuda on a CPU: streams, events, the device, its memory and random numbers."""

import collections
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch


class Stream:
    """A CPU works in order: every stream is the one there is, and waiting for it takes no time."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._outer: list[Any] = []

    def __enter__(self) -> Self:
        self._outer.append(machine.stream)
        machine.stream = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        machine.stream = self._outer.pop()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Of the one stream there is."""
        return 0, 0

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Whether all is done: always."""
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        """The event, or a new one, recorded now."""
        event = event or Event()
        event.record(self)
        return event


class Event:
    """Remembers when it was recorded; whatever came before it is done by then."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds: float | None = None

    def record(self, stream: Any = None) -> None:
        """Now."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end_event: "Event") -> float:
        """Milliseconds from this event to the other.

        Raises:
            RuntimeError: one of them was never recorded.
        """
        if self._seconds is None or end_event._seconds is None:
            raise RuntimeError("both events must be recorded before their time is taken")
        return (end_event._seconds - self._seconds) * 1e3

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Whether all in front of it is done: always."""
        return True


@dataclass
class Machine:
    """What the program last chose."""

    device: int = 0
    stream: Any = None
    default_stream: Stream = field(default_factory=Stream)


machine = Machine()


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


def answer(name: str, make: Callable[[], Any]) -> Callable[..., Any]:
    """A function of this name that answers make(), whatever it is asked.

    A new one for each name: leaving the scope must tell them apart.
    """

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return make()

    stand_in.__name__ = name
    return stand_in


def _impossible(name: str) -> Callable[..., Any]:
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"torch.cuda.{name} works with what a GPU holds, so it has no CPU stand-in: leave what"
            " uses it (CUDA graphs, memory pools) off with --cpu"
        )

    if isinstance(getattr(torch.cuda, name, None), type):
        # a class stays one: it stands in annotations and isinstance
        return type(name, (), {"__new__": stand_in})
    stand_in.__name__ = name
    return stand_in


def _set_device(device: Any) -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    machine.device = index or 0


def _device_count() -> int:
    # a device for each process that the launcher started here
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _set_stream(stream: Any) -> None:
    machine.stream = stream


@contextlib.contextmanager
def _stream(stream: Any) -> Iterator[None]:
    with stream if stream is not None else contextlib.nullcontext():
        yield


def get_rng_state(device: Any = "cuda") -> torch.Tensor:
    """The CPU's, a uint8 vector."""
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    """Set the CPU's, as `get_rng_state` gave it."""
    torch.set_rng_state(new_state)


def _seed(seed: int) -> None:
    # not torch.manual_seed: that one calls torch.cuda.manual_seed_all, which is this
    torch.default_generator.manual_seed(seed)


def cuda_names() -> dict[str, Any]:
    """What stands in for the names of torch.cuda; a release of torch may lack some."""
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
    names: dict[str, Any] = {name: answer(name, lambda: None) for name in none.split()}
    names |= {name: answer(name, lambda: 0) for name in zero.split()}
    names |= {name: _impossible(name) for name in impossible.split()}
    answers: dict[str, Callable[[], Any]] = {
        "current_device": lambda: machine.device,
        "current_stream": lambda: machine.stream or machine.default_stream,
        "default_stream": lambda: machine.default_stream,
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
    names |= {name: answer(name, make) for name, make in answers.items()}
    return names | {
        "Event": Event,
        "Stream": Stream,
        "default_generators": (torch.default_generator,) * _device_count(),
        "device": _Device,
        "get_rng_state": get_rng_state,
        "manual_seed": _seed,
        "manual_seed_all": _seed,
        "set_device": _set_device,
        "set_rng_state": set_rng_state,
        "set_stream": _set_stream,
        "stream": _stream,
    }
