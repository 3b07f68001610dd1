"""When a training run records mHC's metrics, where they go, and what the guard does with them."""

import argparse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_mhc.patches.metrics import PATCH_ID
from megatron_mhc.patches.registry import ENVIRONMENT_VARIABLE, turned_off

from . import guard, strict_json

METRICS_FILE = "mhc_metrics.jsonl"
"""Below --tensorboard-dir, a line a logged step: what `recorder.Recorder.summary` returned.

A number that is not finite, as in a step that fp16's loss scaling skips, is `null` there.
"""


def add_monitor_arguments(group: Any) -> None:
    """Add `--mhc-log-interval`, `--mhc-guard` and `--mhc-guard-gain` to a parser or a group."""
    group.add_argument(
        "--mhc-log-interval",
        type=int,
        metavar="N",
        default=0,
        help="at the first step and every so many steps, write mHC's metrics to the TensorBoard and"
        f" wandb writers and to {METRICS_FILE} in --tensorboard-dir (default: 0, never)",
    )
    group.add_argument(
        "--mhc-guard",
        choices=("warn", "stop"),
        help="at these steps, warn or stop with an error where the composite gain of H_res passes"
        f" --mhc-guard-gain or, with variant mhc, a row misses the sum 1 by {guard.ROW_ERROR:g}"
        " (default: neither)",
    )
    group.add_argument(
        "--mhc-guard-gain",
        type=float,
        metavar="X",
        help="the guard's bound on the largest composite Amax gain over tokens (default:"
        f" {guard.DEFAULT_GAIN:g}: the paper saw about 1.6 with mHC, 3000 with HC)",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse flags of the monitor that cannot work.

    Raises:
        ValueError: says which flag and what to do.
    """
    interval, bound = args.mhc_log_interval, args.mhc_guard_gain
    given = [
        flag
        for flag, value in (
            ("--mhc-log-interval", interval),
            ("--mhc-guard", args.mhc_guard),
            ("--mhc-guard-gain", bound is not None),
        )
        if value
    ]
    if given and not args.mhc:
        raise ValueError(f"{', '.join(given)} given without --mhc: add --mhc, or drop them")
    if interval < 0:
        raise ValueError(f"--mhc-log-interval is {interval}; expected 0 (off) or a number of steps")
    if args.mhc_guard and not interval:
        raise ValueError(
            f"--mhc-guard {args.mhc_guard} looks at the steps that --mhc-log-interval names: add"
            " --mhc-log-interval N"
        )
    if bound is not None and not args.mhc_guard:
        raise ValueError("--mhc-guard-gain is the bound of --mhc-guard: add --mhc-guard warn|stop")
    if bound is not None and not bound >= 1:
        raise ValueError(
            f"--mhc-guard-gain is {bound}; expected at least 1, the gain of a residual"
        )
    if interval and not getattr(args, "tensorboard_dir", None) and getattr(args, "rank", 0) == 0:
        warnings.warn(
            f"--mhc-log-interval without --tensorboard-dir: {METRICS_FILE}, which `python -m"
            " megatron_mhc plot` draws, is not written",
            stacklevel=2,
        )
    if interval and PATCH_ID in turned_off():
        raise ValueError(
            f"--mhc-log-interval needs the patch {PATCH_ID!r}, which {ENVIRONMENT_VARIABLE} turns"
            " off: drop one of the two"
        )


def observe(
    forward_backward: Callable[..., Any], model: list[Any], optimizer: Any, step: int
) -> Callable[..., Any]:
    """The forward and backward of a training step; recorded at step 1 and every interval.

    Args:
        forward_backward: Megatron's schedule; comes back as it is at every other step.
        model: the model chunks of this rank.
        optimizer: Megatron's.
        step: the step as Megatron logs it, from 1.

    Raises:
        guard.GuardError: from the returned function, under `--mhc-guard stop`.
    """
    from megatron.training.global_vars import get_args

    args = get_args()
    interval = getattr(args, "mhc_log_interval", 0)
    if not interval or (step != 1 and step % interval):
        return forward_backward

    is_recorded = False

    def recorded(*positional: Any, **named: Any) -> Any:
        from .recorder import Recorder

        nonlocal is_recorded
        if is_recorded:  # Megatron runs a step again to validate it (--rerun-mode)
            return forward_backward(*positional, **named)
        with Recorder(model) as recorder:
            result = forward_backward(*positional, **named)
        is_recorded = True
        metrics = recorder.summary(step, optimizer)
        write(metrics, args)
        watch(metrics, args)
        return result

    return recorded


def scalars(metrics: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of a step but H_res, under the name that it has in TensorBoard."""
    values, sites = metrics["site"], metrics["sites"]
    yield "mhc/gradient_norm", metrics["gradient_norm"]
    for statistic in ("mean", "max"):
        yield f"mhc/gain_forward_{statistic}", values[f"depth_gain_forward_{statistic}"][-1]
        yield f"mhc/gain_backward_{statistic}", values[f"depth_gain_backward_{statistic}"][0]
    for name, per_site in values.items():
        for site, value in zip(sites, per_site, strict=True):
            tag = f"mhc/site_{site:03d}/{name}"
            if isinstance(value, list):
                yield from ((f"{tag}_{stream}", one) for stream, one in enumerate(value))
            else:
                yield tag, value


def write(metrics: dict[str, Any], args: argparse.Namespace) -> None:
    """Write a step on the last rank, the one that has Megatron's writers, and print a line."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    if args.rank != args.world_size - 1:
        return
    step, named = metrics["step"], dict(scalars(metrics))
    if (writer := get_tensorboard_writer()) is not None:
        for tag, value in named.items():
            writer.add_scalar(tag, value, step)
        writer.flush()
    if (wandb := get_wandb_writer()) is not None:
        wandb.log(named, step)
    if args.tensorboard_dir:
        file = Path(args.tensorboard_dir, METRICS_FILE)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(strict_json.written(metrics) + "\n")
    gains = ", ".join(
        f"{way} {named[f'mhc/gain_{way}_mean']:.4f} (largest {named[f'mhc/gain_{way}_max']:.4f})"
        for way in ("forward", "backward")
    )
    print(
        f"> mHC at step {step}: composite gain {gains}; gradient norm of mHC's parameters"
        f" {metrics['gradient_norm']:.3e}",
        flush=True,
    )


def watch(metrics: dict[str, Any], args: argparse.Namespace) -> None:
    """Warn on the first rank, or stop all of them, where a bound is passed.

    Raises:
        guard.GuardError: under `--mhc-guard stop`; the metrics are the same on every rank.
    """
    if args.mhc_guard is None:
        return
    bound = guard.DEFAULT_GAIN if args.mhc_guard_gain is None else args.mhc_guard_gain
    if not (found := guard.violations(metrics, bound)):
        return
    message = f"mHC's guard at step {metrics['step']}: {'; '.join(found)}"
    if args.mhc_guard == "stop":
        raise guard.GuardError(
            f"{message}. Stopped before this step's update (--mhc-guard stop); nothing was saved"
        )
    from megatron.training.utils import print_rank_0

    print_rank_0(f"WARNING: {message}")
