"""What is counted, held or broken while a scenario trains."""

import contextlib
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from megatron_mhc.pipeline import connect, schedule
from megatron_mhc.pipeline.deadline import Deadline
from megatron_mhc.pipeline.state import rebuild_ahead
from tests.megatron.common.scenario import Scenario
from tests.megatron.common.steps import batches, forward_step


class Saved:
    """A tensor that a graph keeps for its backward: there as long as the graph is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # its graph holds this, and must not be held by it


def interrupted(s: Scenario, model: GPTModel) -> list[weakref.ref[Saved]]:
    """A step that an exception ends at the second layer's MLP: of its forward or its backward.

    Returns:
        What its graph kept.
    """
    kept: list[weakref.ref[Saved]] = []

    def keep(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        kept.append(weakref.ref(saved))
        return saved

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    mlp = model.decoder.layers[1].mlp
    if s.interrupt == "backward":
        hook = mlp.register_forward_hook(lambda *a: a[-1][0].register_hook(interrupt) and None)
    else:
        hook = mlp.register_forward_pre_hook(interrupt)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
            output, loss = forward_step(batches(s, 99), model)
        loss(output)[0].backward()
    except KeyboardInterrupt:
        hook.remove()
    else:
        raise AssertionError(f"the {s.interrupt} was not interrupted")
    assert kept
    return kept


def held_bytes(s: Scenario, model: GPTModel) -> dict[str, int]:
    """What one microbatch's forward keeps for its backward, in bytes of distinct storages.

    kept: as the forward leaves it; ahead: when `rebuild_ahead` has done its work; whole: when the
    backward has rebuilt all (these storages are held here, so nothing is freed); evaluation: what
    a forward without gradients keeps.
    """
    storages: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    def total() -> int:
        return sum(storage.nbytes() for storage in storages.values())

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output, loss = forward_step(batches(s, 99), model)
    result = {"kept": total()}
    while rebuild_ahead(model):
        pass
    result["ahead"] = total()
    loss(output)[0].backward()
    result["whole"] = total()
    storages.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward_step(batches(s, 99), model)
    return {**result, "evaluation": total()}


@contextlib.contextmanager
def counted(owner: type, *names: str) -> Iterator[dict[str, int]]:
    """How often methods of a class are called, by name."""
    counts = dict.fromkeys(names, 0)

    def counting(name: str, method: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return method(*args, **kwargs)

        return count

    with contextlib.ExitStack() as stack:
        for name in names:
            method = getattr(owner, name)
            setattr(owner, name, counting(name, method))
            stack.callback(setattr, owner, name, method)
        yield counts


@contextlib.contextmanager
def most_in_flight() -> Iterator[list[int]]:
    """The most microbatches (of a chunk) between their forward and their backward, by rank."""
    held, most = 0, 0
    forward, backward = schedules.forward_step, schedules.backward_step

    def count_forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal held, most
        held += torch.is_grad_enabled()
        most = max(most, held)
        return forward(*args, **kwargs)

    def count_backward(*args: Any, **kwargs: Any) -> Any:
        nonlocal held
        held -= 1
        return backward(*args, **kwargs)

    schedules.forward_step, schedules.backward_step = count_forward, count_backward
    found: list[int] = []
    try:
        yield found
    finally:
        schedules.forward_step, schedules.backward_step = forward, backward
    found += [0] * dist.get_world_size()
    dist.all_gather_object(found, most)


@contextlib.contextmanager
def groups_made() -> Iterator[list[list[int]]]:
    """The ranks of every process group that this rank takes part in making, in order."""
    made: list[list[int]] = []
    original = dist.new_group

    def new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        made.append(list(ranks))
        return original(ranks, *args, **kwargs)

    dist.new_group = new_group
    try:
        yield made
    finally:
        dist.new_group = original


def fall_silent(what: str) -> None:
    """This rank never connects its links, or never comes to its first step."""

    def silence(*_: Any) -> None:
        time.sleep(60)

    Deadline._watch = silence  # type: ignore[method-assign]
    module, name = {"link": (connect, "_connect"), "rank": (schedule, "two_directions")}[what]
    setattr(module, name, silence)
