"""Resuming with torch's Adam, where a GPU has a fused one, whose state Megatron's code expects."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_mhc.patches.registry import Patch


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
        if "optimizer" not in state_dict:  # Megatron-FSDP's, where each parameter has its step
            return
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


def _empty_shards_too(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sharded(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.optimizer.state
        # every rank's: of each plain tensor one rank's copy is saved
        step = next((of["step"] for of in state.values()), torch.zeros(()))
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in state and parameter.to_local().numel() == 0:
                    averages = {name: torch.zeros_like(parameter) for name in AVERAGES}
                    state[parameter] = {"step": step.clone(), **averages}
        return original(self, *args, **kwargs)

    return sharded


AVERAGES = ("exp_avg", "exp_avg_sq")
"""What Adam keeps for each parameter, beside its step."""

RESUMING: tuple[Patch, ...] = (
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
        "cpu-fsdp-save",
        "megatron.core.optimizer.distrib_optimizer:"
        "DistributedOptimizer.sharded_param_state_fsdp_dtensor",
        _empty_shards_too,
        "torch's Adam keeps nothing for a shard without elements, and ranks that count others wait"
        " for ever",
    ),
)
"""Changes to Megatron's distributed optimizer."""
