"""`doctor --args`: what mHC will cost in time, by `costs.step_costs`, in lines."""

import argparse
import math
from typing import NamedTuple

from megatron_mhc.config import MHCConfig
from megatron_mhc.costs.formulas import training_flops_a_token
from megatron_mhc.costs.kernel_passes import CARDS, Kind, site
from megatron_mhc.costs.sites import Sites
from megatron_mhc.costs.step_costs import Estimate, Run, estimate

MFU = 0.4
"""Where nothing is known."""


class Assumptions(NamedTuple):
    """What a run's flags do not say.

    Attributes:
        card: in `CARDS`.
        link: GB/s between neighbouring pipeline stages.
        mfu: the share of the card's rate at which the ordinary model's FLOPs are done while a stage
            works; by default `MFU`, or what follows from step_ms.
        step_ms: the ordinary model's step where it is known. Beside an mfu, what it takes longer is
            what it stops for at its messages.
    """

    card: str = "H100"
    link: float = 50.0
    mfu: float | None = None
    step_ms: float | None = None


FLAGS = tuple("--" + name.replace("_", "-") for name in Assumptions._fields)
"""What `add_assumptions` adds."""


def positive(text: str) -> float:
    """A number above 0, of a flag."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}; expected a number above 0")
    return value


def share(text: str) -> float:
    """A number above 0 and at most 1, of a flag."""
    if positive(text) > 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a share, at most 1, as 0.4 for 40 %")
    return float(text)


def add_assumptions(parser: argparse.ArgumentParser) -> None:
    """Their flags."""
    of = parser.add_argument_group("what --args reckons a step's time with (give it before --args)")
    default = Assumptions()
    of.add_argument(
        "--card", choices=CARDS, default=default.card, help="every GPU of the run (default: H100)"
    )  # fmt: skip
    of.add_argument(
        "--link", type=positive, default=default.link, metavar="GB/s",
        help="between neighbouring pipeline stages (default: 50, one 400 Gb/s port a GPU)",
    )  # fmt: skip
    of.add_argument(
        "--mfu", type=share,
        help="share of the card's bf16 rate that the ordinary model's layers reach while a stage"
        f" works (default: {MFU}, or what follows from --step-ms)",
    )  # fmt: skip
    of.add_argument(
        "--step-ms", type=positive, metavar="MS",
        help="the ordinary model's step, where you know it: --mfu follows from it. Of a pipeline"
        " give both: what the step takes longer than --mfu says, it stops for at its messages",
    )  # fmt: skip


def run_of(
    args: argparse.Namespace, mhc: MHCConfig, sublayers: list[list[int]], tokens: int
) -> Run:
    """What the time of a step follows from.

    Args:
        args: Megatron's parsed arguments.
        mhc: the settings.
        sublayers: with a site, of each stage's model chunks.
        tokens: of a microbatch, whose streams a GPU holds.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training.training import num_floating_point_operations

    whole = num_floating_point_operations(args, 1) / args.seq_length
    forward = (whole - training_flops_a_token(args, mhc)) / 3
    logits = 2 * args.hidden_size * args.padded_vocab_size
    shared = args.tensor_model_parallel_size * args.context_parallel_size
    of_a_rank = args.micro_batch_size * args.seq_length / shared
    stages = args.pipeline_model_parallel_size
    dtype = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    return Run(
        tokens=tokens,
        width=args.hidden_size,
        kind=Kind(dtype, mhc.num_streams, mhc.delayed),
        sublayers=sublayers,
        flops=(forward - logits) / Sites.of(args).run * of_a_rank,
        last=logits * of_a_rank,
        backward=3.0 if args.recompute_granularity == "full" else 2.0,
        microbatches=get_num_microbatches(),
        group=args.microbatch_group_size_per_vp_stage or stages,
        hosted=getattr(args, "cuda_graph_impl", "none") in (None, "none"),
    )


def lines(run: Run, given: Assumptions) -> list[str]:
    """The page's lines about time.

    Raises:
        ValueError: a measured step that the model does not allow.
    """
    card = CARDS[given.card]
    step_ms = given.step_ms
    mfu = MFU if given.mfu is None and step_ms is None else given.mfu
    found = estimate(run, card, given.link, mfu, None if step_ms is None else step_ms / 1e3)
    how = f"every stage at {found.mfu:.1%} of an {given.card}'s {card.tflops:,.0f} TFLOP/s"
    if step_ms is None:
        how += " (--mfu, or --step-ms with your own)"
    else:
        how = f"as you measured it (--step-ms): {how}"
    rows = [
        "a step's time, by a small model of the pipeline (docs/step-costs.md), not measured:",
        f"  ordinary {found.ordinary * 1e3:,.0f} ms, {how}",
        "  " + _shares(run, found, site(card, run.tokens, run.width, run.kind), given.link),
    ]
    if len(run.sublayers) > 1:
        rows.append("  " + _overlapped(found))
    return rows


def _more(seconds: float, of: float) -> str:
    return f"{seconds / of:+.1%}"


def _shares(run: Run, found: Estimate, kernels: tuple[float, float], link: float) -> str:
    whole = found.ordinary
    row = f"with mHC {found.messages * 1e3:,.0f} ms ({_more(found.messages - whole, whole)}):"
    row += f" kernels {_more(found.kernels - whole, whole)}"
    row += f" ({sum(kernels) * 1e3:.2f} ms a site and microbatch, both ways)"
    row += f", host {_more(found.launches - found.kernels, whole)}"
    row += "" if run.hosted else " (CUDA graphs)"
    if len(run.sublayers) > 1:
        size = run.bytes / 1e6
        row += f", messages {_more(found.messages - found.launches, whole)}"
        row += f" ({run.kind.n * size:,.0f} MB for {size:,.0f}: {found.message[1] * 1e3:.2f} ms for"
        row += f" {found.message[0] * 1e3:.2f} at {link:g} GB/s)"
    return row


def _overlapped(found: Estimate) -> str:
    row = f"with --mhc-overlap-p2p {found.overlap * 1e3:,.0f} ms"
    row += f" ({_more(found.overlap - found.ordinary, found.ordinary)})"
    if found.in_flight is not None:
        row += f", with --mhc-overlap-in-flight 2 {found.in_flight * 1e3:,.0f} ms"
        row += f" ({_more(found.in_flight - found.ordinary, found.ordinary)})"
    return row
