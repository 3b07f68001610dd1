"""One torchrun process of the tests: trains a scenario at a time and tells what happened.

torchrun --nproc-per-node N -m tests.megatron.common.worker SCENARIOS_AS_JSON RESULT_FILE
"""

import contextlib
import dataclasses
import gc
import itertools
import json
import sys
import time
import weakref
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
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megatron_mhc.model.connection import HyperConnection
from megatron_mhc.model.parameters import is_hyper_connection
from megatron_mhc.pipeline import links, schedule
from megatron_mhc.pipeline.deadline import Deadline
from megatron_mhc.pipeline.side_streams import SideStreams
from megatron_mhc.pipeline.state import rebuild_ahead
from tests.megatron.common.models import SEQUENCE, VOCABULARY, Scenario
from tests.megatron.common.rendezvous import hosts_wait


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


def batches(s: Scenario, step: int) -> Iterator[Tensor]:
    """This data-parallel rank's microbatches of tokens [b, SEQUENCE + 1]."""
    # two batches in turn: few enough to be learnt by heart
    generator = torch.Generator().manual_seed(1000 + step % 2)
    tokens = torch.randint(0, VOCABULARY, (s.batch, SEQUENCE + 1), generator=generator)
    ranks = parallel_state.get_data_parallel_world_size()
    for microbatch in tokens.chunk(s.microbatches):
        yield microbatch.chunk(ranks)[parallel_state.get_data_parallel_rank()]


def forward_step(iterator: Iterator[Tensor], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Megatron's forward_step: the loss of a microbatch of tokens, averaged over them."""
    tokens = next(iterator)
    positions = torch.arange(SEQUENCE).expand(tokens.shape[0], -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    losses = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])

    def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean = output.float().mean()
        # a copy: the schedule divides the loss by the number of microbatches in place
        return mean, {"loss": mean.detach().clone()}

    return losses, loss


@torch.no_grad()
def decoded(model: GPTModel) -> dict[str, Tensor]:
    """Logits [b, t, VOCABULARY] of the last five of twelve tokens.

    whole: all tokens in one forward; cached: eight, then one at a time, past keys and values kept.
    """
    model.eval()
    tokens = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(12).expand(2, -1)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).triu(1)
    whole = model(tokens, positions, mask)
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=12)
    options = {"inference_context": context, "runtime_gather_output": True}
    parts = [model(tokens[:, :8], positions[:, :8], mask[..., :8, :8], **options)]
    context.enable_decode_mode()
    for at in range(8, 12):
        context.sequence_len_offset = at
        one = slice(at, at + 1)
        parts.append(model(tokens[:, one], positions[:, one], None, **options))
    return {"whole": whole[:, -5:], "cached": torch.cat(parts, 1)[:, -5:]}


class Letters:
    """A tokenizer of Megatron's kind: a token is a letter's number."""

    vocab_size, bos, eod = VOCABULARY, 1, VOCABULARY - 1

    def tokenize(self, text: str) -> list[int]:
        """The numbers of a text's letters."""
        return [ord(letter) for letter in text]

    def detokenize(self, tokens: list[int], **_: Any) -> str:
        """The text of these numbers."""
        return "".join(map(chr, tokens))


def generated(model: GPTModel) -> dict[str, list[str]]:
    """Texts that follow two prompts, greedily.

    engine: from Megatron's static engine, which runs in inference mode; forward: from whole
    forwards under `no_grad`, one for each letter.
    """
    prompts, letters, length = ["to be or", "not to be"], Letters(), 8
    model.eval()
    model.config.attention_backend = AttnBackend.local
    texts = []
    for prompt in prompts:
        tokens = letters.tokenize(prompt)
        for _ in range(length):
            mask = torch.ones(1, 1, len(tokens), len(tokens), dtype=torch.bool).triu(1)
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], mask)
            tokens.append(int(logits[0, -1].argmax()))
        texts.append(letters.detokenize(tokens[len(prompt) :]))
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=SEQUENCE)
    controller = TextGenerationController(GPTInferenceWrapper(model, context), letters)
    engine = StaticInferenceEngine(controller, legacy=True)
    sampling = SamplingParams(num_tokens_to_generate=length, top_k=1, return_log_probs=True)
    requests = engine.generate(prompts=prompts, sampling_params=sampling)
    InferenceMode.unset_active()  # of this process: other models of it train
    return {"engine": [request.generated_text for request in requests], "forward": texts}


def mean_loss(reduced: list[dict[str, Tensor]]) -> float:
    """A step's loss, from the last stages of all data-parallel ranks."""
    mine = [entry["loss"].item() for entry in reduced]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    losses = torch.tensor([loss for rank in gathered for loss in rank])
    return losses.mean().item()


def mtp_loss() -> list[float]:
    """The losses of multi-token prediction since the last call, a depth each, as logged."""
    tracker = MTPLossLoggingHelper.tracker
    mine = tracker["loss_values"].tolist() if "loss_values" in tracker else None
    MTPLossLoggingHelper.tracker = {}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    ranks = [values for values in gathered if values is not None]
    return [sum(depth) / len(ranks) for depth in zip(*ranks, strict=True)]


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


MESSAGES = [
    *("recv_forward", "send_forward", "recv_backward", "send_backward"),
    *("send_forward_recv_backward", "send_backward_recv_forward"),
    *("send_forward_recv_forward", "send_backward_recv_backward"),
]


def run(s: Scenario) -> dict[str, Any]:
    """Build, train and describe a scenario.

    Returns:
        losses (one a step), mtp_losses (a list a step: of all its microbatches, by depth),
        parameters (whole, after training), gradients (of mHC's on this rank, a dict a step),
        dtypes and weight_decay (of each parameter, by name), and
        linked (for each layer but the last, whether its last site knows the next layer's first),
        calls (how often each connection ran for a microbatch, on average),
        messages (calls of each method of P2PCommunicator), side_streams (those of SideStreams),
        left (how many tensors of an interrupted step's graph are still there after it),
        in_flight (`most_in_flight`), reduced (calls of its chunks' `start_grad_sync`, by rank),
        groups (`groups_made`, by rank).
    """
    waits = hosts_wait() if s.hosts_wait else contextlib.nullcontext()
    with (
        waits,
        counted(P2PCommunicator, *MESSAGES) as messages,
        counted(SideStreams, "run_detached", "run_and_join") as side_streams,
        counted(DistributedDataParallel, "start_grad_sync") as reduced,
        most_in_flight() as in_flight,
        groups_made() as groups,
    ):
        result = train(s)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (reduced["start_grad_sync"], groups))
    counts = {"messages": messages, "side_streams": side_streams, "in_flight": in_flight}
    counts["reduced"], counts["groups"] = map(list, zip(*everywhere, strict=True))
    return result | counts


def fall_silent(what: str) -> None:
    """This rank never connects its links, or never comes to its first step."""

    def silence(*_: Any) -> None:
        time.sleep(60)

    Deadline._watch = silence  # type: ignore[method-assign]
    module, name = {"link": (links, "_connect"), "rank": (schedule, "two_directions")}[what]
    setattr(module, name, silence)


def train(s: Scenario) -> dict[str, Any]:
    """`run`, but for what is counted there."""
    if s.silent and dist.get_rank() == 1:
        fall_silent(s.silent)
    parallel_state.initialize_model_parallel(**s.parallel)
    if s.mhc_by_rank is not None:
        s.mhc = s.mhc_by_rank[dist.get_rank()]
    if s.hidden_by_rank is not None:
        s.config = s.config | {"hidden_size": s.hidden_by_rank[dist.get_rank()]}
    config = models.transformer_config(s)
    config.finalize_model_grads_func = finalize_model_grads
    if s.share_config:
        models.build(dataclasses.replace(s, mhc={}), config)
    cores = models.build(s, config)
    model = [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(**s.ddp),
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
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            **{
                "optimizer": "adam",
                "lr": 1e-3,
                "min_lr": 1e-3,
                "weight_decay": 0.1,
                "clip_grad": 1.0,
                "bf16": s.bf16,
                "params_dtype": config.params_dtype,
                "use_distributed_optimizer": s.ddp.get("use_distributed_optimizer", False),
                "overlap_param_gather": s.ddp.get("overlap_param_gather", False),
            }
            | s.optimizer
        ),
        model,
    )
    config.grad_scale_func = optimizer.scale_loss
    if s.load is not None:
        (core,) = cores
        state = dist_checkpointing.load({"model": core.sharded_state_dict()}, s.load)
        core.load_state_dict(state["model"])
        optimizer.reload_model_params()
    if s.ddp.get("overlap_param_gather"):
        config.param_sync_func = model[0].start_param_sync
    left = 0
    if s.interrupt:
        kept = interrupted(s, cores[0])
        gc.collect()
        left = sum(saved() is not None for saved in kept)
    held = held_bytes(s, cores[0]) if s.hold else None
    ranks = parallel_state.get_data_parallel_world_size()

    def step_func(iterator: Iterator[Tensor], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        result = forward_step(iterator, chunk)
        if s.rebuild_ahead:
            rebuild_ahead(chunk)
        return result

    def run_step(step: int, forward_only: bool = False) -> float:
        iterators = [batches(s, step) for _ in model]
        reduced = get_forward_backward_func()(
            forward_step_func=step_func,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=model,
            num_microbatches=s.microbatches,
            forward_only=forward_only,
            **(message | evaluation if forward_only else message),
        )
        return mean_loss(reduced)

    message = {"seq_length": SEQUENCE, "micro_batch_size": s.batch // s.microbatches // ranks}
    if s.message_by_rank is not None:
        message |= s.message_by_rank[dist.get_rank()]
    by_rank = s.evaluation_by_rank
    evaluation = {} if by_rank is None else by_rank[dist.get_rank()]
    calls: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda *_: calls.update({name: calls.get(name, 0) + 1})

    for name, module in cores[0].named_modules():
        if isinstance(module, HyperConnection):
            module.register_forward_hook(count(name))
    losses, gradients, mtp_losses = [], [], []
    for step in range(s.first_step, s.first_step + s.steps):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses.append(run_step(step))
        mtp_losses.append(mtp_loss())
        gradients.append(
            {
                name: parameter.main_grad.detach().clone()
                for core in cores
                for name, parameter in core.named_parameters()
                if is_hyper_connection(parameter)
            }
        )
        optimizer.step()
        if s.evaluate_between:
            with torch.no_grad():
                losses.append(run_step(step, forward_only=True))
    if s.ddp.get("overlap_param_gather"):
        model[0].disable_forward_pre_hook(param_sync=True)
    if s.evaluate:
        with torch.no_grad():
            losses.append(run_step(s.first_step + s.steps, forward_only=True))
    if s.save is not None:
        dist_checkpointing.save({"model": cores[0].sharded_state_dict()}, s.save)
    core = cores[0]
    names = {parameter: name for name, parameter in core.named_parameters()}
    result = {
        "losses": losses,
        "gradients": gradients,
        "mtp_losses": mtp_losses,
        "parameters": models.full_parameters(cores),
        "held": held,
        "left": left,
        "dtypes": {name: str(p.dtype) for name, p in core.named_parameters()},
        "calls": {name: calls[name] / (s.steps * s.microbatches) for name in calls},
        "linked": [
            layer.mlp_site.following is after.attention_site
            for layer, after in itertools.pairwise(core.decoder.layers)
            if s.mhc is not None
        ],
        "weight_decay": {
            names[parameter]: group["wd_mult"]
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter in names
        },
        "decoded": decoded(cores[0]) if s.decode else None,
        "generated": generated(cores[0]) if s.generate else None,
    }
    parallel_state.destroy_model_parallel()
    return result


def main() -> None:
    """Run every scenario of the command line; rank 0 writes what they returned."""
    scenarios, result_file = sys.argv[1:]
    dist.init_process_group("gloo")
    results = {name: run(Scenario(**s)) for name, s in json.loads(scenarios).items()}
    if dist.get_rank() == 0:
        torch.save(results, result_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
