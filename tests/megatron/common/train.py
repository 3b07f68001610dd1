"""Builds a scenario's model, trains it with Megatron's optimizer and schedule, and describes it."""

import dataclasses
import gc
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.megatron.common import models  # isort: skip  (first: it readies Megatron for the CPU)

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_mhc.model.connection import HyperConnection
from megatron_mhc.model.parameters import is_hyper_connection
from megatron_mhc.pipeline.state import rebuild_ahead
from tests.megatron.common.generation import decoded, generated
from tests.megatron.common.offloading import Offloading, offload_on_cpu
from tests.megatron.common.probes import fall_silent, held_bytes, interrupted
from tests.megatron.common.scenario import SEQUENCE, Scenario
from tests.megatron.common.steps import batches, forward_step, mean_loss, mtp_loss

FSDP = {
    "use_megatron_fsdp": True,
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}


class Training:
    """A scenario's model, wrapped and with its optimizer, on this rank.

    Attributes:
        cores: the model's chunks.
        model: the chunks as they are trained.
        losses, mtp_losses, gradients, calls: as `worker.run` returns them; calls in all.
    """

    def __init__(self, s: Scenario) -> None:
        self.s = s
        self.config = config_of(s)
        if self.config.cpu_offloading:
            offload_on_cpu()
        if s.share_config:
            models.build(dataclasses.replace(s, mhc={}), self.config)
        self.cores = models.build(s, self.config)
        self.model = wrapped(s, self.config, self.cores)
        self.optimizer = optimizer_of(s, self.config, self.model)
        if s.load is not None:
            (core,) = self.cores
            state = dist_checkpointing.load({"model": core.sharded_state_dict()}, s.load)
            core.load_state_dict(state["model"])
            self.optimizer.reload_model_params()
        if s.ddp.get("overlap_param_gather"):
            self.config.param_sync_func = self.model[0].start_param_sync
        self.losses: list[float] = []
        self.mtp_losses: list[list[float]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.calls: dict[str, int] = {}

    def count_calls(self) -> None:
        """Of every connection of the first chunk, from now on."""

        def count(name: str) -> Any:
            return lambda *_: self.calls.update({name: self.calls.get(name, 0) + 1})

        for name, module in self.cores[0].named_modules():
            if isinstance(module, HyperConnection):
                module.register_forward_hook(count(name))

    def _forward_step(self, iterator: Iterator[Tensor], chunk: Any, **options: Any) -> Any:
        result = forward_step(iterator, chunk, **options)
        if self.s.rebuild_ahead:
            rebuild_ahead(chunk)
        return result

    def run_step(self, step: int, forward_only: bool = False) -> float:
        """The loss of a step's microbatches, by Megatron's schedule."""
        s, ranks = self.s, parallel_state.get_data_parallel_world_size()
        message = {"seq_length": SEQUENCE, "micro_batch_size": s.batch // s.microbatches // ranks}
        if s.message_by_rank is not None:
            message |= s.message_by_rank[dist.get_rank()]
        if forward_only and s.evaluation_by_rank is not None:
            message |= s.evaluation_by_rank[dist.get_rank()]
        iterators = [batches(s, step) for _ in self.model]
        reduced = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(self.model) > 1 else iterators[0],
            model=self.model,
            num_microbatches=s.microbatches,
            forward_only=forward_only,
            **message,
        )
        return mean_loss(reduced)

    def train_step(self, step: int) -> None:
        """One step, and what it left."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.losses.append(self.run_step(step))
        self.mtp_losses.append(mtp_loss())
        self.gradients.append(
            {
                name: parameter.main_grad.detach().clone()
                for core in self.cores
                for name, parameter in core.named_parameters()
                if is_hyper_connection(parameter) and self.s.fsdp is None
            }
        )
        self.optimizer.step()

    def evaluate(self, step: int) -> None:
        """A step's microbatches forward only."""
        with torch.no_grad():
            self.losses.append(self.run_step(step, forward_only=True))

    def described(self) -> dict[str, Any]:
        """What `worker.run` returns of the trained model."""
        s, core = self.s, self.cores[0]
        named = core.named_parameters()
        if s.fsdp is not None:
            named = self.model[0].param_and_grad_buffer.optimizer_named_parameters
        names = {parameter: name for name, parameter in named}
        return {
            "losses": self.losses,
            "gradients": self.gradients,
            "mtp_losses": self.mtp_losses,
            "parameters": models.full_parameters(self.cores)
            if s.fsdp is None
            else {name: unsharded(s, parameter) for parameter, name in names.items()},
            "dtypes": {name: str(p.dtype) for name, p in core.named_parameters()},
            "calls": {name: self.calls[name] / (s.steps * s.microbatches) for name in self.calls},
            "linked": [
                layer.sites[-1].following is after.sites[0]
                for layer, after in itertools.pairwise(core.decoder.layers)
                if s.mhc is not None
            ],
            "weight_decay": {
                names[parameter]: group["wd_mult"]
                for group in self.optimizer.param_groups
                for parameter in group["params"]
                if parameter in names
            },
        }


def config_of(s: Scenario) -> TransformerConfig:
    """This rank's configuration; the scenario gets what is this rank's alone."""
    if s.mhc_by_rank is not None:
        s.mhc = s.mhc_by_rank[dist.get_rank()]
    if s.hidden_by_rank is not None:
        s.config = s.config | {"hidden_size": s.hidden_by_rank[dist.get_rank()]}
    config = models.transformer_config(s)
    config.finalize_model_grads_func = finalize_model_grads
    return config


def wrapped(
    s: Scenario, config: TransformerConfig, cores: list[GPTModel]
) -> list[DistributedDataParallel]:
    """The chunks in Megatron's own wrappers, which the configuration's schedule knows."""
    wrapper, settings = DistributedDataParallel, s.ddp
    if s.fsdp is not None:
        wrapper = FullyShardedDataParallel
        # for fp32 gradients Megatron's default is a sum that NCCL alone can scale
        own = {"data_parallel_sharding_strategy": s.fsdp, "gradient_reduce_div_fusion": s.bf16}
        settings = s.ddp | FSDP | own
    model = [
        wrapper(
            config,
            DistributedDataParallelConfig(**settings),
            Float16Module(config, core) if s.bf16 else core,
            disable_bucketing=index > 0,
        )
        for index, core in enumerate(cores)
    ]
    no_sync = [chunk.no_sync for chunk in model]
    config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
    if s.align_grad_reduce:
        reduce = [chunk.start_grad_sync for chunk in model]
        config.grad_sync_func = reduce if len(model) > 1 else reduce[0]
    return model


def optimizer_of(
    s: Scenario, config: TransformerConfig, model: list[DistributedDataParallel]
) -> Any:
    """Megatron's optimizer."""
    settings = {
        "optimizer": "adam",
        "lr": 1e-3,
        "min_lr": 1e-3,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
        "bf16": s.bf16,
        "params_dtype": config.params_dtype,
        "use_distributed_optimizer": s.fsdp is not None
        or s.ddp.get("use_distributed_optimizer", False),
        "overlap_param_gather": s.ddp.get("overlap_param_gather", False),
    }
    optimizer = get_megatron_optimizer(OptimizerConfig(**(settings | s.optimizer)), model)
    config.grad_scale_func = optimizer.scale_loss
    return optimizer


def unsharded(s: Scenario, parameter: Any) -> Tensor:
    """A parameter of Megatron-FSDP's, whole but for tensor parallelism, flat."""
    local = parameter.to_local().detach().clone().flatten()
    if s.fsdp == "no_shard":
        return local
    shards: list[Any] = [None] * parallel_state.get_data_parallel_world_size()
    dist.all_gather_object(shards, local, group=parallel_state.get_data_parallel_group())
    return torch.cat(shards)


def train(s: Scenario) -> dict[str, Any]:
    """`worker.run`, but for what is counted there."""
    if s.silent and dist.get_rank() == 1:
        fall_silent(s.silent)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(**s.parallel)
    training = Training(s)
    core = training.cores[0]
    left = 0
    if s.interrupt:
        kept = interrupted(s, core)
        gc.collect()
        left = sum(saved() is not None for saved in kept)
    held = held_bytes(s, core) if s.hold else None
    training.count_calls()
    for step in range(s.first_step, s.first_step + s.steps):
        training.train_step(step)
        if s.evaluate_between:
            training.evaluate(step)
    if s.ddp.get("overlap_param_gather"):
        training.model[0].disable_forward_pre_hook(param_sync=True)
    if s.evaluate:
        training.evaluate(s.first_step + s.steps)
    if s.save is not None:
        dist_checkpointing.save({"model": core.sharded_state_dict()}, s.save)
    result = {
        **training.described(),
        "held": held,
        "left": left,
        "offloaded": Offloading.taken,
        "decoded": decoded(core) if s.decode else None,
        "generated": generated(core) if s.generate else None,
    }
    # a process alone has the same groups in every scenario: to make them takes as long as a step
    if dist.get_world_size() > 1 or s.parallel:
        parallel_state.destroy_model_parallel()
    return result


def end_groups() -> None:
    """End every process group that is not kept but the first: their threads would poll for ever."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD and not parallel_state.model_parallel_is_initialized():
            dist.destroy_process_group(group)
    gc.collect()  # what still holds one
