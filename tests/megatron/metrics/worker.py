"""One process of the metrics tests: `worker.run` with every step recorded.

python -m tests.megatron.metrics.worker SCENARIOS_AS_JSON RESULT_FILE
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.megatron.common import train, worker  # isort: skip  (first: it readies Megatron for the CPU)

from megatron_mhc.metrics.recorder import Recorder
from megatron_mhc.model.layer import MHCLayer
from tests.megatron.common.scenario import Scenario


class Observer:
    """Stands in for Megatron's schedule: records every step, and the truth beside it.

    The truth is taken another way than the recorder's: the streams in front of the norm slots, the
    parameters and their gradients, of the last step, in float64.
    """

    def __init__(self) -> None:
        self.schedule: Callable[[], Callable[..., Any]] = train.get_forward_backward_func
        self.make_optimizer = train.get_megatron_optimizer
        self.optimizer: Any = None
        self.summaries: list[dict[str, Any]] = []
        self.truth: dict[int, dict[str, Tensor]] = {}

    def get_megatron_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's, remembered."""
        self.optimizer = self.make_optimizer(*args, **kwargs)
        return self.optimizer

    def _read(self, site: int, connection: Any, _: Any, inputs: tuple[Any, ...]) -> None:
        if site not in self.truth:
            n, x = connection.mhc.num_streams, inputs[0].detach().double()
            if x.shape[-1] == connection.hidden_size:  # the model's entry
                x = x.repeat(1, 1, n)
            # without what may stand behind the streams
            x = x[..., : n * connection.hidden_size].unflatten(-1, (n, -1))
            named = connection.named_parameters()
            parameters = {name: p.detach().double().clone() for name, p in named}
            self.truth[site] = {"x": x.flatten(0, 1).clone(), **parameters}

    def get_forward_backward_func(self) -> Callable[..., Any]:
        """Megatron's schedule, recorded."""

        def recorded(**kwargs: Any) -> Any:
            model = kwargs["model"]
            chunks = model if isinstance(model, list) else [model]
            self.truth, hooks = {}, []
            modules = (m for chunk in chunks for m in chunk.modules())
            layers = [m for m in modules if isinstance(m, MHCLayer) and not m.is_mtp]
            sites = {}
            for layer in layers:
                both = (("attention", "input_layernorm"), ("mlp", "pre_mlp_layernorm"))
                slots = [slot for slot in both if hasattr(layer, f"{slot[0]}_connection")]
                for i, (name, norm) in enumerate(slots):
                    connection, slot = getattr(layer, f"{name}_connection"), getattr(layer, norm)
                    site = len(slots) * (layer.layer_number - 1) + i
                    sites[site] = connection
                    read = functools.partial(self._read, site, connection)
                    hooks.append(slot.register_forward_pre_hook(read, prepend=True))
            before = {site: len(c._forward_hooks) for site, c in sites.items()}
            with Recorder(chunks) as recorder:
                result = self.schedule()(**kwargs)
            for hook in hooks:
                hook.remove()
            after = {site: len(c._forward_hooks) for site, c in sites.items()}
            assert after == before, "the recorder left hooks behind"
            for site, connection in sites.items():
                gradients = [p.main_grad.double().flatten() for p in connection.parameters()]
                self.truth[site]["gradient"] = torch.cat(gradients)
            step = len(self.summaries) + 1
            self.summaries.append(recorder.summary(step, self.optimizer))
            return result

        return recorded


def run(log: bool = True, **settings: Any) -> dict[str, Any]:
    """`worker.run` of a scenario; with `log`, also metrics (a step each) and truth.

    truth: for every site of the model the last step's float64 values, a list over the ranks that
    hold the site.
    """
    scenario = Scenario(**settings)
    if not log:
        return worker.run(scenario)
    observer = Observer()
    names = ("get_forward_backward_func", "get_megatron_optimizer")
    kept = {name: getattr(train, name) for name in names}
    for name in names:
        setattr(train, name, getattr(observer, name))
    try:
        result = worker.run(scenario)
    finally:
        for name in names:
            setattr(train, name, kept[name])
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (observer.truth, observer.summaries))
    assert all(summaries == observer.summaries for _, summaries in ranks), "ranks disagree"
    sites = sorted({site for truth, _ in ranks for site in truth})
    truth = {site: [truth[site] for truth, _ in ranks if site in truth] for site in sites}
    return {**result, "metrics": observer.summaries, "truth": truth}


if __name__ == "__main__":
    worker.work(lambda settings: run(**settings))
