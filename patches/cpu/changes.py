"""What Megatron needs changed to run on a CPU, beside what torch does (`torch_cuda`)."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.distributed_c10d import _CoalescingManager, _world

from megatron_mhc.patches.registry import Patch

from .hybrid import HYBRID
from .resuming import RESUMING
from .without_kernels import WITHOUT_KERNELS

NO_GRAPHS = "a CUDA graph replays what a GPU recorded: leave CUDA graphs off with --cpu"


def _skip_if_shipped(original: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(original)
    def compile_helpers() -> None:
        try:
            import megatron.core.datasets.helpers_cpp  # noqa: F401
        except ImportError:
            original()

    return compile_helpers


def _cpu_rng_state(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def get(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        if graph_safe:
            raise RuntimeError(NO_GRAPHS)
        return torch.get_rng_state()

    return get


def _set_cpu_rng_state(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def set_(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        if graph_safe:
            raise RuntimeError(NO_GRAPHS)
        torch.set_rng_state(new_state)

    return set_


def _mark_sequence_parallel(original: Any) -> Any:
    make = original.__func__ if isinstance(original, staticmethod) else original

    @functools.wraps(make)
    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        without = copy.copy(config)
        without.sequence_parallel = False
        norm: torch.nn.Module = make(cls, without, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    return staticmethod(new)


def _head_dimensions(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(
        self: Any,
        config: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        if k_channels is not None and kwargs.get("softmax_scale") is None:
            kwargs["softmax_scale"] = k_channels**-0.5
        original(self, config, *args, **kwargs)
        if v_channels is not None:
            # the width of the result, the only place where the values' width is asked for
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    return init


def _splits_as_numbers(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    return move


def _never(original: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(original)
    def never(*args: Any, **kwargs: Any) -> bool:
        return False

    return never


def _forked_writer(original: Any) -> Any:
    start = original.__func__ if isinstance(original, classmethod) else original

    @functools.wraps(start)
    def _get_process(cls: type, rank: int, mp_mode: str = "fork", *args: Any, **kwargs: Any) -> Any:
        return start(cls, rank, "fork", *args, **kwargs)

    return classmethod(_get_process)


def _copied_first(original: Any) -> Any:
    preload = original.__func__ if isinstance(original, staticmethod) else original

    @functools.wraps(preload)
    def preload_tensors(write_buckets: list[Any], *args: Any, **kwargs: Any) -> Any:
        copies = [
            (file, key, (objects, [(item, tensor.clone()) for item, tensor in tensors]))
            for file, key, (objects, tensors) in write_buckets
        ]
        return preload(copies, *args, **kwargs)

    return staticmethod(preload_tensors)


def _coalesced_for_gloo(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    @contextlib.contextmanager
    def coalesced(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
        group = group or torch.distributed.group.WORLD
        works = _CoalescingManager()
        # between these, torch notes collectives down instead of starting them
        noted = _world.pg_coalesce_state.setdefault(group, [])
        try:
            yield works
        finally:
            del _world.pg_coalesce_state[group]
        if any(op.redop != noted[0].redop for op in noted):
            raise RuntimeError(
                "a batch of collectives has several reduce operations; torch would run all of it"
                " with the first"
            )
        for dtype in dict.fromkeys(op.tensor.dtype for op in noted):
            with original(group, device, async_ops) as part:
                alike = [op for op in noted if op.tensor.dtype == dtype]
                _world.pg_coalesce_state[group] = alike
            # Here, not where Megatron waits: what it frees and points elsewhere meanwhile, CUDA's
            # streams keep in order, and gloo's threads do not. One FSDP training in 25 ended with a
            # broken heap in a gather.
            part.wait()

    return coalesced


def _uneven_for_gloo(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({part.numel() for part in tensor_list}) < 2:
            return original(tensor_list, tensor, group, async_op)
        dtypes = {tensor.dtype, *(part.dtype for part in tensor_list)}
        if len(dtypes) > 1:  # as torch says in front of NCCL
            raise ValueError(f"Invalid usage of tensors with different dtypes: {dtypes}")
        tensor_list[torch.distributed.get_rank(group)].copy_(tensor)
        for rank, part in enumerate(tensor_list):
            torch.distributed.broadcast(part, group=group, group_src=rank)
        return _CoalescingManager() if async_op else None

    return all_gather


def _all_on_device(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def split(self: Any, offload_fraction: float) -> Any:
        groups, _, _, _, fp32 = original(self, 0.0)
        return [], groups, {}, {}, fp32

    return split


SHIPPED_HELPERS = Patch(
    "shipped-dataset-helpers",
    "megatron.core.datasets.utils:compile_helpers",
    _skip_if_shipped,
    "the wheel has the dataset helpers compiled, and not the Makefile to compile them with",
)

CPU_PATCHES: tuple[Patch, ...] = (
    SHIPPED_HELPERS,
    Patch(
        "cpu-rng-get",
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        _cpu_rng_state,
        "the state of the generator that a CPU's dropout draws from",
    ),
    Patch(
        "cpu-rng-set",
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        _set_cpu_rng_state,
        "the original waits for CUDA to start, which it never does",
    ),
    Patch(
        "cpu-sequence-parallel-norm",
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        _mark_sequence_parallel,
        "torch's norms under sequence parallelism, their parameters marked for the reduction",
    ),
    Patch(
        "cpu-attention-head-dimensions",
        "megatron.core.transformer.dot_product_attention:DotProductAttention.__init__",
        _head_dimensions,
        "the local attention for MLA, whose queries and values have different widths",
    ),
    Patch(
        "cpu-all-to-all-splits",
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        _splits_as_numbers,
        "split sizes that look like a CPU's tensors already must become numbers all the same",
    ),
    Patch(
        "cpu-softmax",
        "megatron.core.fusions.fused_softmax:FusedScaleMaskSoftmax.is_kernel_available",
        _never,
        "the fused softmax is a CUDA kernel; Megatron's own torch formula takes its place",
    ),
    Patch(
        "cpu-inference-linears",
        "megatron.core.transformer.multi_token_prediction:is_inference_column_parallel_linear",
        _never,
        "where Transformer Engine is not installed, Megatron asks for a class that is none",
        optional=True,
    ),
    *RESUMING,
    Patch(
        "cpu-async-save",
        "megatron.core.dist_checkpointing.strategies.async_utils:"
        "PersistentAsyncCaller._get_process",
        _forked_writer,
        "the process that writes asynchronous checkpoints is a fork, which has the stand-in too",
    ),
    Patch(
        "cpu-async-save-copy",
        "megatron.core.dist_checkpointing.strategies.filesystem_async:"
        "FileSystemWriterAsync.preload_tensors",
        _copied_first,
        "taking a tensor off the device is a copy: else training goes on in what is being written",
    ),
    Patch(
        "cpu-mixed-gathers",
        "megatron.core.distributed.param_and_grad_buffer:_coalescing_manager",
        _coalesced_for_gloo,
        "gloo mixes up two dtypes that are gathered in one go, and its threads go on with what"
        " Megatron frees meanwhile",
    ),
    Patch(
        "cpu-mixed-gathers-fsdp",
        "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer:"
        "_coalescing_manager",
        _coalesced_for_gloo,
        "the same, of shards",
        optional=True,
    ),
    Patch(
        "cpu-uneven-gathers",
        "torch.distributed:all_gather",
        _uneven_for_gloo,
        "gloo gathers tensors of one size alone; Muon's ranks have as many parameters as there are",
    ),
    Patch(
        "cpu-optimizer-offload",
        "megatron.core.optimizer.cpu_offloading.hybrid_optimizer:"
        "HybridDeviceOptimizer._get_sub_optimizer_param_groups",
        _all_on_device,
        "parameters that are on a CPU already are the device's: none is taken off it",
    ),
    *HYBRID,
    *WITHOUT_KERNELS,
)
"""The changes to Megatron; those to torch are `torch_cuda`'s."""
