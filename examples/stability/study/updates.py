"""What the optimizer makes of mHC's parameters: their gradients, Adam's roots, their steps.

Goes by PyTorch's own hooks (where a module registers a parameter; before and after an optimizer's
step), so nothing of Megatron is changed. For optimizers that keep Adam's `exp_avg_sq` and step the
parameters themselves: mHC's are fp32 and their own master copies, unless the optimizer is
distributed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from megatron_mhc.model.connection import HyperConnection

from .runs import UPDATES_FILE


class Known(NamedTuple):
    """A parameter of a site, by name, and the site's number of streams."""

    parameter: Tensor
    name: str
    streams: int

    def parts(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A tensor of the parameter's shape, cut by the coefficients that it makes."""
        n = self.streams
        rows = {"phi": [n, n, n * n], "bias": [n, n, n * n], "alpha": [1, 1, 1]}.get(self.name)
        if rows is None:
            yield self.name, tensor
            return
        for which, part in zip(("pre", "post", "res"), tensor.split(rows), strict=True):
            yield f"{self.name}_{which}", part


def root_mean_square(tensors: list[Tensor]) -> float:
    """Over all elements of all tensors."""
    return torch.cat([t.double().flatten() for t in tensors]).square().mean().sqrt().item()


class Watch:
    """Hooks that write what Adam does to mHC's parameters, and change it for ablations.

    Args:
        static: phi (theta, in HC) stays at its start, zero.
        phi_std: phi (theta) starts as normal numbers of this deviation, the same for a site in
            every run; 0: as the model has it, at zero.
        rate_factor: multiplies every step of alpha and b, as a larger learning rate would: Adam's
            step is proportional to it, and these have no weight decay.
    """

    def __init__(self, static: bool, rate_factor: float, phi_std: float) -> None:
        self.static, self.rate_factor, self.phi_std = static, rate_factor, phi_std
        self.known: dict[int, Known] = {}
        self.before: dict[int, Tensor] = {}

    def register(self) -> None:
        """From now on, for all models and optimizers of this process."""
        register_module_parameter_registration_hook(self._registered)
        register_optimizer_step_pre_hook(self._before_step)
        register_optimizer_step_post_hook(self._after_step)

    def _registered(self, module: Any, name: str, parameter: Any) -> None:
        if isinstance(module, HyperConnection):
            self.known[id(parameter)] = Known(parameter, name, module.mhc.num_streams)
            is_phi = name in ("phi", "theta")
            if self.static and is_phi:
                parameter.requires_grad_(False)
            if self.phi_std and is_phi:
                own = torch.Generator(parameter.device).manual_seed(module.site)
                with torch.no_grad():
                    parameter.normal_(0, self.phi_std, generator=own)

    def _own(self, optimizer: Any) -> list[tuple[Known, dict[str, Any]]]:
        """This optimizer's parameters of mHC, each with its group."""
        return [
            (self.known[id(parameter)], group)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self.known
        ]

    def _step(self) -> int | None:
        """The step, from 1, if it is one of those that are logged."""
        from megatron.training import get_args

        args = get_args()
        step, interval = args.curr_iteration + 1, getattr(args, "mhc_log_interval", 0)
        is_logged = interval and (step == 1 or step % interval == 0)
        return step if is_logged and args.tensorboard_dir else None

    @torch.no_grad()
    def _before_step(self, optimizer: Any, *_: Any) -> None:
        is_all = self._step() is not None
        for known, _group in self._own(optimizer):
            if is_all or (self.rate_factor != 1 and known.name in ("alpha", "bias")):
                self.before[id(known.parameter)] = known.parameter.detach().clone()

    @torch.no_grad()
    def _after_step(self, optimizer: Any, *_: Any) -> None:
        own, step = self._own(optimizer), self._step()
        if self.rate_factor != 1:
            for known, _group in own:
                if known.name in ("alpha", "bias"):
                    start = self.before[id(known.parameter)]
                    known.parameter.copy_(start + self.rate_factor * (known.parameter - start))
        if own and step is not None:
            self._write(step, self._sizes(optimizer, own))
        self.before.clear()

    def _sizes(
        self, optimizer: Any, own: list[tuple[Known, dict[str, Any]]]
    ) -> dict[str, dict[str, float]]:
        """Root mean squares by group, over all sites.

        gradient: as Adam sees it, so after clipping; root: of Adam's second moment, without its
        bias, the number that eps stands beside; update: the step, in learning rates (1 where a
        gradient has one sign); small: the share of elements whose root is below ten times eps.
        """
        found: dict[str, dict[str, list[Tensor]]] = {}
        for known, group in own:
            state = optimizer.state[known.parameter]
            steps = float(group["step"] if "step" in group else state["step"])
            root = (state["exp_avg_sq"] / (1 - group["betas"][1] ** steps)).sqrt()
            moved = known.parameter - self.before[id(known.parameter)]
            values = {
                "gradient": known.parameter.grad,
                "root": root,
                "update": moved / group["lr"] if group["lr"] else moved,
                "small": (root < 10 * group["eps"]).double(),
            }
            for name, value in values.items():
                for part, cut in known.parts(value):
                    found.setdefault(part, {}).setdefault(name, []).append(cut)
        return {
            part: {
                name: torch.cat([t.flatten() for t in tensors]).mean().item()
                if name == "small"
                else root_mean_square(tensors)
                for name, tensors in sizes.items()
            }
            for part, sizes in found.items()
        }

    def _write(self, step: int, groups: dict[str, dict[str, float]]) -> None:
        from megatron.training import get_args

        file = Path(get_args().tensorboard_dir, UPDATES_FILE)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(json.dumps({"step": step, "groups": groups}) + "\n")
