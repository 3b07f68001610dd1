"""A patch of megatron.training: the throughput that Megatron logs counts mHC's work."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

from .registry import Patch


def throughput_patch(extra: Callable[[argparse.Namespace], float]) -> Patch:
    """`extra(args)` says how many FLOPs a token of a training step come on top of the model's."""

    def replace(original: Callable[..., float]) -> Callable[..., float]:
        @functools.wraps(original)
        def num_floating_point_operations(
            args: argparse.Namespace,
            batch_size: int,
            seqlen_squared_sum_in_batch: Any = None,
            total_real_tokens_in_batch: Any = None,
        ) -> float:
            counted = original(
                args, batch_size, seqlen_squared_sum_in_batch, total_real_tokens_in_batch
            )
            tokens = total_real_tokens_in_batch
            if tokens is None:
                tokens = batch_size * args.seq_length
            return counted + tokens * extra(args)

        return num_floating_point_operations

    return Patch(
        id="throughput",
        target="megatron.training.training:num_floating_point_operations",
        replace=replace,
        why="counts mHC's FLOPs in the throughput that --log-throughput prints",
    )
