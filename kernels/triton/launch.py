"""What every launcher needs: the launch itself, dense arguments, packed weights."""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import padded

PHI_TERMS = 3
"""bf16 terms that phi is split into for bf16 streams: 8 bits of its mantissa each, all of it."""


_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
"""What Triton made of a kernel for a kind of arguments, and its constants in their order."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)` on the device of its first argument.

    Triton looks at every argument at every launch. All that it looks for is in `_kind` and the
    constants. So what it compiled once is launched directly from then on, which takes the host half
    the time (docs/measured-facts.md).

    Args:
        kernel: a function under `triton.jit`.
        grid: one to three numbers of programs.
        arguments: its parameters that are no constants: tensors, absent ones (None), tuples of
            those, floats, and integers that it does not specialize. The first is a tensor.
        constants: its other parameters by name, and Triton's options.

    Raises:
        TypeError: an integer that the kernel would specialize, or a constant among the arguments.
    """
    device = arguments[0].device
    if device.type != "cuda":  # Triton's interpreter
        kernel[grid](*arguments, **constants)
        return
    here = device.index == torch.cuda.current_device()
    with contextlib.nullcontext() if here else torch.cuda.device(device):
        launch_here(device.index, kernel, grid, arguments, constants)


def launch_here(
    device: int,
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """`launch` on the current device, which this one is."""
    key = (kernel.fn, device, *map(_kind, arguments), *constants.items())
    if key in _compiled:
        compiled, constant = _compiled[key]
        compiled[(*grid, 1, 1)[:3]](*arguments, *constant)
    else:
        constant = _constants(kernel, arguments, constants)
        _compiled[key] = kernel[grid](*arguments, **constants), constant


def _kind(argument: Any) -> Any:
    """All of an argument that Triton compiles a kernel for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    if isinstance(argument, int):
        return argument >= 2**31  # 32 bits, or 64
    return type(argument)


def _constants(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> list[Any]:
    """The constants in the order of the kernel's parameters, behind its arguments."""
    for parameter, argument in zip(kernel.params, arguments, strict=False):
        specialized = isinstance(argument, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or specialized:
            raise TypeError(f"{kernel.__name__}: {parameter.name} is compiled for each value")
    return [constants[name] for name in kernel.arg_names[len(arguments) :]]


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself where it is contiguous, else a copy that is; None stays None."""
    return None if tensor is None else tensor.contiguous()


@triton.jit
def pack_kernel(
    phi_ptr,
    packed_ptr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """packed[term, row, c] with sum over terms = phi[row, c]; rows past ROWS are zero."""
    c = (tl.program_id(0) * BC + tl.arange(0, BC))[None, :]
    row = (tl.program_id(1) * BR + tl.arange(0, BR))[:, None]
    rest = tl.load(phi_ptr + row * WIDTH + c, (c < WIDTH) & (row < ROWS), 0.0)  # [BR, BC]
    for term in tl.static_range(TERMS):
        part = rest.to(packed_ptr.dtype.element_ty)
        tl.store(packed_ptr + (term * R + row) * WIDTH + c, part, (c < WIDTH) & (row < R))
        rest -= part.to(tl.float32)


def pack_weights(phi: Tensor, dtype: torch.dtype) -> Tensor:
    """phi [rows, n*C] fp32 -> [terms, padded rows, n*C], for products with streams in `dtype`.

    bf16 streams are exact in bf16, so phi as a sum of bf16 terms gives a nearly exact product at
    the bf16 rate. Other streams meet phi in fp32 (three TF32 products).
    """
    rows, width = phi.shape
    terms = PHI_TERMS if dtype == torch.bfloat16 else 1
    packed = torch.empty(
        terms,
        padded(rows),
        width,
        device=phi.device,
        dtype=torch.bfloat16 if terms > 1 else torch.float32,
    )
    block_rows, block_columns = 16, 64
    launch(
        pack_kernel,
        (triton.cdiv(width, block_columns), triton.cdiv(padded(rows), block_rows)),
        phi,
        packed,
        WIDTH=width,
        ROWS=rows,
        R=padded(rows),
        TERMS=terms,
        BR=block_rows,
        BC=block_columns,
        num_warps=4,
    )
    return packed
