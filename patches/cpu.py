"""Megatron on a CPU: what it needs changed, and the way in and out."""

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.distributed_c10d import _CoalescingManager, _world

from megatron_mhc.patches.registry import Patch, locate, registry
from megatron_mhc.patches.torch_cuda import cuda_is_cpu

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


def _before_first_step(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        state = self.optimizer.state
        if state:
            return original(self)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state[parameter] = {"step": torch.zeros(())}
        try:
            return original(self)
        finally:
            state.clear()

    return state_dict


def _step_of_checkpoint(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        original(self, state_dict)
        (step,) = {group["step"] for group in state_dict["optimizer"]["param_groups"]}
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(step, dtype=torch.float32)

    return load_state_dict


def _with_step(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def set_(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        # the step that `_step_of_checkpoint` sets, onto itself, where the checkpoint has none
        step = {"step": state["step"]} if "step" in state else {}
        original(self, model_param, step | tensors)

    return set_


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


def _one_dtype_at_a_time(original: Callable[..., Any]) -> Callable[..., Any]:
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
        for dtype in dict.fromkeys(op.tensor.dtype for op in noted):
            with original(group, device, async_ops) as part:
                alike = [op for op in noted if op.tensor.dtype == dtype]
                _world.pg_coalesce_state[group] = alike
            works.works += part.works

    return coalesced


def _instead(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


def _megatrons(name: str) -> Callable[[Any], Any]:
    def find(original: Any) -> Any:
        owner, attribute = locate(f"megatron.core.{name}")
        return getattr(owner, attribute)

    return find


def _without_kernels(why: str, **values: tuple[str, Callable[[Any], Any]]) -> tuple[Patch, ...]:
    return tuple(
        Patch(f"cpu-{name.replace('_', '-')}", f"megatron.core.{target}", replace, why)
        for name, (target, replace) in values.items()
    )


_WITHOUT_KERNELS = (
    *_without_kernels(
        "torch's optimizers, where Transformer Engine or Apex is installed too",
        adam=("optimizer:Adam", _instead(torch.optim.AdamW)),
        sgd=("optimizer:SGD", _instead(torch.optim.SGD)),
        torch_optimizers=("optimizer:USING_PYTORCH_OPTIMIZER", _instead(True)),
        distributed_adam=("optimizer.distrib_optimizer:Adam", _instead(torch.optim.Adam)),
        no_fused_adam=("optimizer.distrib_optimizer:HAVE_APEX_OR_TE", _instead(False)),
        no_te_adam=("optimizer.distrib_optimizer:USING_TE_OPTIMIZER", _instead(False)),
        no_apex_adam=("optimizer.distrib_optimizer:USING_APEX_OPTIMIZER", _instead(False)),
    ),
    *_without_kernels(
        "Megatron's own loops over tensors, where fused ones are installed too",
        clip_apply=(
            "optimizer.clip_grads:multi_tensor_applier",
            _megatrons("utils:local_multi_tensor_applier"),
        ),
        clip_norm=(
            "optimizer.clip_grads:l2_norm_impl",
            _megatrons("utils:local_multi_tensor_l2_norm"),
        ),
        clip_scale=(
            "optimizer.clip_grads:multi_tensor_scale_impl",
            _megatrons("utils:local_multi_tensor_scale"),
        ),
        clip_scale_tensor=("optimizer.clip_grads:multi_tensor_scale_tensor_impl", _instead(None)),
        copy_apply=(
            "optimizer.optimizer:multi_tensor_applier",
            _megatrons("utils:local_multi_tensor_applier"),
        ),
        copy_scale=(
            "optimizer.optimizer:multi_tensor_scale_impl",
            _megatrons("utils:local_multi_tensor_scale"),
        ),
    ),
    *_without_kernels(
        "torch's norm in the local specs, where Transformer Engine or Apex is installed too",
        local_norm=(
            "models.backends:LNImpl",
            _megatrons("transformer.torch_norm:WrappedTorchNorm"),
        ),
        final_norm=(
            "transformer.transformer_block:LayerNormImpl",
            _megatrons("transformer.torch_norm:WrappedTorchNorm"),
        ),
    ),
    *_without_kernels(
        "a fusion asked for that has no CPU code stops Megatron with its own message",
        no_gradient_accumulation_fusion=(
            "tensor_parallel.layers:_grad_accum_fusion_available",
            _instead(False),
        ),
        no_rope_fusion=(
            "models.common.embeddings.rope_utils:fused_apply_rotary_pos_emb",
            _instead(None),
        ),
        no_packed_rope_fusion=(
            "models.common.embeddings.rope_utils:fused_apply_rotary_pos_emb_thd",
            _instead(None),
        ),
        no_mla_rope_fusion=(
            "transformer.multi_latent_attention:fused_apply_mla_rope_for_q",
            _instead(None),
        ),
    ),
)

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
        "cpu-resume",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",
        _before_first_step,
        "resuming asks torch's Adam for its step before there is one",
    ),
    Patch(
        "cpu-resume-step",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
        _step_of_checkpoint,
        "resuming loses the step of torch's Adam, which corrects its averages by it",
    ),
    Patch(
        "cpu-resume-step-of-each",
        "megatron.core.optimizer.distrib_optimizer:"
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        _with_step,
        "a fully reshardable checkpoint has no step of torch's Adam for each parameter",
    ),
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
        _one_dtype_at_a_time,
        "gloo mixes up parameters of two dtypes that are gathered in one go",
    ),
    *_WITHOUT_KERNELS,
)
"""The changes to Megatron; those to torch are `torch_cuda`'s."""


def _is_news(record: logging.LogRecord) -> bool:
    # Megatron warns at each dropout: with one generator for both, it can only be so
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


@contextlib.contextmanager
def _without_generator_warning() -> Iterator[None]:
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(_is_news)
    try:
        yield
    finally:
        logger.removeFilter(_is_news)


_inside: contextlib.ExitStack | None = None


def active() -> bool:
    """Whether the CPU stands in for CUDA."""
    return _inside is not None


def enter() -> None:
    """Let the CPU stand in for CUDA, until `leave`; inside already, nothing changes."""
    global _inside
    if _inside is not None:
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(cuda_is_cpu())
        stack.enter_context(_without_generator_warning())
        statuses = registry.status(*CPU_PATCHES)
        # what somebody else applied is theirs to undo
        mine = [status.patch for status in statuses if status.state != "applied"]
        registry.apply(*mine)
        for patch in mine:
            stack.callback(registry.undo, patch.id)
        _inside = stack.pop_all()


def leave() -> None:
    """Put everything back; outside already, nothing changes."""
    global _inside
    if _inside is not None:
        stack, _inside = _inside, None
        stack.close()


@contextlib.contextmanager
def cpu_stand_in() -> Iterator[None]:
    """The CPU stands in for CUDA inside; within another one, the outer one ends it."""
    if active():
        yield
        return
    enter()
    try:
        yield
    finally:
        leave()
