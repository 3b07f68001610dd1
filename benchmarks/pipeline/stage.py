"""A pipeline stage: a real model chunk, and steps of it in stock order or ours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs as specs
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

from benchmarks.common import gpt
from megatron_mhc import MHCConfig
from megatron_mhc.model.config_marks import IN_FLIGHT
from megatron_mhc.pipeline.state import state_of

ORDERS = {"stock order": 0, "overlap": 1, "overlap, 2 in flight": 2}
"""Each order of a step, and the microbatches that a stage starts ahead in it; 0: Megatron's own."""


def file_name(order: str) -> str:
    """An order as a part of a file's name."""
    return order.replace(", ", "-").replace(" ", "-")


class StageGroup:
    """In the place of the pipeline's process group: where this stage stands."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        """This stage, from 0."""
        return self._rank

    def size(self) -> int:
        """The number of stages."""
        return self._size


@dataclass
class Sizes:
    """Of a stage and its microbatches."""

    layers: int = 4
    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    groups: int = 8
    sequence: int = 4096
    batch: int = 1
    stages: int = 4
    stage: int = 2
    spec: str = "te"

    def mask(self) -> Tensor | None:
        """What attention must not see; Transformer Engine knows."""
        if self.spec == "te":
            return None
        shape = (1, 1, self.sequence, self.sequence)
        return torch.ones(shape, dtype=torch.bool, device="cuda").triu(1)


def build_stage(sizes: Sizes, mhc: MHCConfig) -> tuple[torch.nn.Module, ProcessGroupCollection]:
    """A stage in bf16, the same weights every time, and the process groups it was built for.

    Alone in its pipeline it is one of `sizes.stages`, and neither the first nor the last of them.
    """
    alone = parallel_state.get_pipeline_model_parallel_world_size() == 1
    config = gpt.dense_config(
        sizes,
        num_layers=sizes.layers * sizes.stages,
        pipeline_dtype=torch.bfloat16,
        pipeline_model_parallel_size=sizes.stages,
        masked_softmax_fusion=False,
        deallocate_pipeline_outputs=True,
        batch_p2p_comm=False,
        use_cpu_initialization=sizes.spec == "local",
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if alone:
        # what looks for its place in the pipeline without a group finds it here
        parallel_state.set_pipeline_model_parallel_world_size(sizes.stages)
        parallel_state.set_pipeline_model_parallel_rank(sizes.stage)
        groups.pp = StageGroup(sizes.stage, sizes.stages)
    spec = (
        specs.get_gpt_layer_with_transformer_engine_spec()
        if sizes.spec == "te"
        else specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    )
    model = gpt.build(
        config,
        spec,
        mhc,
        sizes.sequence,
        share_embeddings_and_output_weights=False,
        pre_process=not alone and sizes.stage == 0,
        post_process=not alone and sizes.stage == sizes.stages - 1,
        pg_collection=groups,
    )
    return model, groups


class Stage:
    """The model chunk of one stage, and what every step of it has."""

    def __init__(self, sizes: Sizes, mhc: MHCConfig, microbatches: int) -> None:
        self.sizes, self.microbatches = sizes, microbatches
        self.model, self.groups = build_stage(sizes, mhc)
        self.config = get_model_config(self.model)
        self.positions = torch.arange(sizes.sequence, device="cuda")[None]

    def choose_order(self, order: str) -> None:
        """The order of the steps that follow, of `ORDERS`."""
        setattr(self.config, IN_FLIGHT, ORDERS[order])
        state_of(self.model).side_streams = None

    def clear(self) -> None:
        """Forget the gradients of the step before."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def schedule(self, forward_step: Callable[..., Any], **settings: Any) -> Any:
        """Forward and backward of all microbatches; gradients stay in the parameters.

        Args:
            forward_step: as Megatron's schedule calls it.
            settings: of the schedule.
        """
        return schedules.forward_backward_pipelining_without_interleaving(
            forward_step_func=forward_step,
            data_iterator=None,
            model=self.model,
            num_microbatches=self.microbatches,
            seq_length=self.sizes.sequence,
            micro_batch_size=self.sizes.batch,
            **settings,
        )
