"""Launching a kernel: through Triton, which compiles it, the first time; past Triton from then on.

At every launch Triton looks at every argument, which takes the host several times as long as the
launch itself (docs/measured-facts.md). A `Launch` is made once for arguments of a kind. What may
still differ from call to call, and Triton would compile anew for, is looked at in one place below.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import islice
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction, driver


class Compiled(NamedTuple):
    """A compiled kernel as Triton (3.5 to 3.8) launches it: `run(*grid, stream, function, metadata,
    launch_metadata, enter_hook, exit_hook, *arguments, *constants)`."""

    run: Callable[..., None]
    function: Any
    metadata: Any
    current_device: Callable[[], int]
    current_stream: Callable[[int], int]


def through_triton(
    kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> Compiled | None:
    """Launch a kernel on the current device as Triton does; None under its interpreter."""
    compiled = kernel[grid](*arguments, **constants)
    if not isinstance(kernel, JITFunction):
        return None
    device, stream = driver.active.get_current_device, driver.active.get_current_stream
    return Compiled(compiled.run, compiled.function, compiled.packed_metadata, device, stream)


class Launch:
    """`kernel[grid](*tensors, *numbers, **constants)` on one device, for arguments of one kind.

    Which tensors are absent, and the dtypes of the others, are the same in every call: a function
    of what they depend on makes one `Launch` for each kind (`prepared`).

    Args:
        kernel: a function under `triton.jit`. Its parameters are tensors, then numbers that it does
            not specialize (a count, then floats), then constants.
        device: of the tensors.
        groups: for each parameter that is a tensor None, or how many a tuple of them has.
        constants: its constants by name, and Triton's options.
    """

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        groups: tuple[int | None, ...] | None = None,
        **constants: Any,
    ) -> None:
        self.kernel = kernel
        self._device = device
        self._groups = groups
        self.constants = constants
        self._in_order = [constants[name] for name in kernel.arg_names if name in constants]
        self._compiled: Compiled | None = None

    def __call__(
        self, grid: tuple[int, int], tensors: Sequence[Tensor | None], *numbers: Any
    ) -> None:
        """Launch it.

        Args:
            grid: two numbers of programs.
            tensors: None for an absent one; those of tuples one after the other.
            numbers: a whole number, then floats.
        """
        addresses: Any = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        hooks = knobs.runtime
        is_profiled = hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls
        # what Triton compiles a kernel of its own for: addresses that 16 does not divide, 64 bits
        is_other = reduce(or_, addresses) & 15 or numbers[0] >> 31 or is_profiled
        compiled = self._compiled
        if compiled is None or is_other:
            with self._on_device():
                arguments = (*self._grouped(tensors), *numbers)
                compiled = through_triton(self.kernel, grid, arguments, self.constants)
            self._compiled = self._compiled if is_other else compiled
            return
        run, function, metadata, current_device, current_stream = compiled
        index = self._device.index
        if self._groups is not None:
            addresses = self._grouped(addresses)
        ready = (current_stream(index), function, metadata, None, None, None)
        whole = (*grid, 1, *ready, *addresses, *numbers, *self._in_order)
        if current_device() == index:
            run(*whole)
        else:
            with self._on_device():
                run(*whole)

    def _grouped(self, flat: Sequence[Any]) -> Sequence[Any]:
        """One for each parameter of the kernel."""
        if self._groups is None:
            return flat
        left = iter(flat)
        return [next(left) if n is None else tuple(islice(left, n)) for n in self._groups]

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        on_gpu = self._device.type == "cuda"  # else Triton's interpreter
        return torch.cuda.device(self._device) if on_gpu else contextlib.nullcontext()


_prepared: list[Any] = []


def prepared[F: Callable[..., Any]](make: F) -> F:
    """A decorator: what the function makes for some arguments is made once."""
    cached = functools.cache(make)
    _prepared.append(cached)
    return cached  # type: ignore[return-value]


def forget() -> None:
    """Have all that is `prepared` made anew: the tiles are others."""
    for cached in _prepared:
        cached.cache_clear()
