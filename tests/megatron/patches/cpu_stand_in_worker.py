"""What the processes of `test_cpu_training` do: Megatron-Core's own parts, with no change to them.

python -m torch.distributed.run ... -m tests.megatron.patches.cpu_stand_in_worker alone|pair FOLDER
python -m torch.distributed.run ... -m tests.megatron.patches.cpu_stand_in_worker train SCRIPT FLAGS
"""

import dataclasses
import itertools
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_mhc.patches import cpu
from tests.megatron.patches.cpu_stand_in_model import (
    BATCH,
    SEQUENCE,
    STEPS,
    Run,
    batches,
    forward_step,
)

Results = dict[str, Any]


def train(run: Run, model: Any, data: Iterator[torch.Tensor], steps: int = STEPS) -> list[float]:
    """Train in Megatron's schedule, DDP and optimizer; returns the losses over all data."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    overlap = run.distributed_optimizer
    config = model.config
    config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=overlap,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
        ),
        model,
    )
    if overlap:
        config.no_sync_func = ddp.no_sync
    # an epsilon this large makes Adam linear in small gradients: rounding stays rounding
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=0.3,
            adam_eps=1.0,
            weight_decay=0.01,
            clip_grad=1.0,
            use_distributed_optimizer=overlap,
            overlap_param_gather=overlap,
        ),
        [ddp],
    )
    losses = []
    for _ in range(steps):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        (report,) = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data,
            model=[ddp],
            num_microbatches=1,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        success, _, _ = optimizer.step()
        assert success
        loss = report["loss"]
        group = parallel_state.get_data_parallel_group()
        torch.distributed.all_reduce(loss, group=group)
        losses.append(loss.item() / group.size())
    if overlap:
        ddp.disable_forward_pre_hook()
    return losses


def save(model: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    if torch.distributed.get_rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), str(folder))


def load(model: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(model.sharded_state_dict(), str(folder))
    model.load_state_dict(state)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def gradients(run: Run) -> dict[str, torch.Tensor]:
    """The gradients of one step, with the weights and dropout that the run's seed gives."""
    model = run.model()
    losses, reduce = forward_step(batches(), model)
    reduce(losses)[0].backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


SPREAD = {
    "tensor-LayerNorm": Run(tensor=2, sequence_parallel=True),
    "tensor-RMSNorm": Run(tensor=2, sequence_parallel=True, normalization="RMSNorm"),
    "expert": Run(expert=2, experts=4),
    "data": Run(distributed_optimizer=True),
}
"""What two processes must compute as one does."""


def in_one(run: Run) -> Run:
    return dataclasses.replace(
        run, tensor=1, expert=1, sequence_parallel=False, distributed_optimizer=False
    )


def recomputed(run: Run) -> Results:
    """Gradients without recomputation, with it, and with other dropout."""
    again = dataclasses.replace(run, recompute=True)
    return {
        "kept": gradients(run),
        "recomputed": gradients(again),
        "without dropout": gradients(dataclasses.replace(run, dropout=0.0)),
    }


def attention_of_mla() -> Results:
    """Trains MLA, and asks the first layer's attention about what the model gave it."""
    run = Run(mla=True, normalization="RMSNorm")
    model = run.model()
    caught: list[Any] = []
    attention = model.decoder.layers[0].self_attention.core_attention
    handle = attention.register_forward_pre_hook(lambda module, args: caught.append(args))
    forward_step(batches(), model)
    handle.remove()
    # new weights are small, and their attention almost even: larger queries make it choose
    query, key, value = (tensor.detach() for tensor in caught[0][:3])
    inputs = [tensor.requires_grad_() for tensor in (query * 100, key, value)]
    output = attention(*inputs, None)
    output.square().sum().backward()
    data = itertools.repeat(next(batches()))
    return {
        "inputs": [tensor.detach() for tensor in inputs],
        "output": output.detach(),
        "gradients": [tensor.grad for tensor in inputs],
        "default scale": default_scale(model.config),
        "losses": train(run, model, data, steps=10),
    }


def default_scale(config: Any) -> float:
    """The scale of an attention that is told its widths and no scale."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    widths = {"k_channels": 25, "v_channels": 12}
    return DotProductAttention(config, 1, AttnMaskType.causal, "self", **widths).softmax_scale


def alone(folder: Path) -> Results:
    results: Results = {"mla": attention_of_mla(), "recompute": recomputed(Run(dropout=0.2))}
    for name, run in SPREAD.items():
        model = in_one(run).model()
        save(model, folder / f"{name}-before")
        before = weights(model)
        losses = train(in_one(run), model, batches())
        results[name] = {"losses": losses, "before": before, "after": weights(model)}
    return results


def pair(folder: Path) -> Results:
    spread = Run(tensor=2, sequence_parallel=True, dropout=0.2)
    results: Results = {"recompute": recomputed(spread)}
    for name, run in SPREAD.items():
        model = run.model()
        load(model, folder / f"{name}-before")
        losses = train(run, model, batches())
        save(model, folder / f"{name}-after")
        whole = in_one(run).model()
        load(whole, folder / f"{name}-after")
        results[name] = {"losses": losses, "after": weights(whole)}
    return results


def main() -> None:
    cpu.enter()
    what, where, *flags = sys.argv[1:]
    if what == "train":
        sys.argv = [where, *flags]
        runpy.run_path(where, run_name="__main__")
        return
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    results = {"alone": alone, "pair": pair}[what](Path(where))
    if torch.distributed.get_rank() == 0:
        torch.save(results, Path(where, f"{what}.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    cpu.leave()


if __name__ == "__main__":
    main()
