"""Streams and the H_pre that comes with them as one tensor, where delayed sites are apart.

A delayed site reads with the H_pre of the site before. Where both run in one operation, nothing is
handed on. Elsewhere (between pipeline stages, around a checkpoint, in another node of a schedule)
Megatron hands on one tensor and gets one gradient back, so H_pre travels in columns behind the
streams: [s, b, n*C + n*terms]. In 16-bit streams a weight is the sum of three columns, which gives
back all 24 bits of bf16's fp32 weights; its gradient comes back in the same columns.

A second message between stages would need a second of everything that Megatron's schedules and
ours keep a tensor of: shapes, receives, what is freed, what the backward returns. The columns are
less than a thousandth of the message (n 4, C 4096). They cost a copy of the streams at either end,
and a stage keeps what arrived beside the streams that it took from it.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mhc.config import MHCConfig

STREAMS_ALONE = (
    "a delayed site got streams alone, and reads with the H_pre of the site before: that one has"
    " left its input here, for other streams or in another region of autograd. A checkpoint around"
    " some layers, or what replaces the streams between two of them, does not work with delayed"
    " sites (convention deepseek_v4_1); --recompute-granularity full does"
)
"""What is wrong where the columns are missing."""


def terms(dtype: torch.dtype) -> int:
    """Columns of this dtype that hold one weight."""
    return 3 if dtype.itemsize < 4 else 1


def extra_columns(mhc: MHCConfig, dtype: torch.dtype) -> int:
    """Columns behind streams of this dtype; none where sites are not delayed."""
    return mhc.num_streams * terms(dtype) if mhc.delayed else 0


def _to_columns(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., n] fp32 (or float64) -> [..., n*terms]: each term is what the ones before leave."""
    columns = []
    for _ in range(terms(dtype)):
        columns.append(weights.to(dtype))
        weights = weights - columns[-1].to(weights.dtype)
    return torch.cat(columns, -1)


def _from_columns(columns: Tensor) -> Tensor:
    """The way back."""
    dtype = torch.float64 if columns.dtype == torch.float64 else torch.float32
    first, *rest = columns.to(dtype).chunk(terms(columns.dtype), -1)
    for term in rest:
        first = first + term
    return first


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, h_pre: Tensor) -> Tensor:
        ctx.width = streams.shape[-1]
        return torch.cat([streams, _to_columns(h_pre, streams.dtype)], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient[..., : ctx.width].contiguous(), _from_columns(gradient[..., ctx.width :])


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor, width: int) -> tuple[Tensor, Tensor]:
        return joined[..., :width].contiguous(), _from_columns(joined[..., width:])

    @staticmethod
    def backward(ctx: Any, d_streams: Tensor, d_h_pre: Tensor) -> Any:
        return torch.cat([d_streams, _to_columns(d_h_pre, d_streams.dtype)], -1), None


def join(streams: Tensor, h_pre: Tensor) -> Tensor:
    """Streams [..., n*C] and H_pre [..., n] as one tensor [..., n*C + n*terms]."""
    joined: Tensor = _Join.apply(streams, h_pre)
    return joined


def part(joined: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The streams [..., width], width = n*C, and the H_pre [..., n] that were joined."""
    streams, h_pre = _Part.apply(joined, width)
    return streams, h_pre
