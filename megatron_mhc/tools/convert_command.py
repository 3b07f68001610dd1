"""`python -m megatron_mhc convert`: its command line."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mhc.model.stored_settings import FUNCTION_FIELDS
from megatron_mhc.start.flags import add_setting_flags, config_from_arguments, flags_of
from megatron_mhc.start.settings import SETTINGS, flag_of

from .convert import convert
from .convert_hf import from_hf, to_hf
from .convert_hybrid import convert_to_hybrid
from .convert_native import from_native, to_native

DESCRIPTION = """\
Makes a start for a model with mHC from the checkpoint of an ordinary one (format torch_dist, any
parallel sizes; no GPU needed). SOURCE is only read; TARGET is written whole or not at all.

  python -m megatron_mhc convert runs/gpt/checkpoints runs/gpt-mhc/start
  torchrun ... -m megatron_mhc.run pretrain_gpt.py FLAGS --mhc --load runs/gpt-mhc/start

With --mhc-init residual the new model computes the old one's function at its first step, up to
rounding (in convention deepseek_v4 up to its eps, 1e-6 a site). Train it with the same --mhc-*
flags as are given here: they are in the checkpoint, and others are refused.

It is a start: iteration 0, a new optimizer, schedule of the learning rate and order of data. The
optimizer's state is left out, as by Megatron's --finetune; with bf16 the weights are the rounded
ones. To stop and resume, give the training its own --save, and --load that from then on.

Models that have hyper-connections already, in and out (docs/conventions.md has a table of them):

  convert --from megatron NATIVE TARGET         a GPT with Megatron's own mHC becomes one with ours.
                                                The checkpoint says which of Megatron's it is; where
                                                it does not, --mhc-convention does
  convert --to megatron OURS TARGET             and back, for the Megatron whose convention it has
  convert --from hf REST TARGET --hf FOLDER     the hyper-connections of DeepSeek-V4, V4.1 or
                                                GLM-5.3 from FOLDER, all other weights from REST, an
                                                ordinary checkpoint of Megatron's that you have
                                                mapped from FOLDER (Megatron-Bridge, your script)
  convert --to hf OURS TARGET --hf FOLDER       a copy of the checkpoint in FOLDER with the trained
                                                hyper-connections in it; without --hf these alone,
                                                as safetensors with an index

These compute the same function before and after, and print what was mapped and what has no
counterpart. The optimizer begins anew in all of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `convert`."""
    kinds = ("megatron", "hf")
    parser.add_argument(
        "--from",
        dest="origin",
        choices=kinds,
        help="SOURCE (or --hf) has hyper-connections of Megatron's own, or of Hugging Face",
    )
    parser.add_argument(
        "--to", dest="goal", choices=kinds, help="SOURCE has mHC, and TARGET is for one of these"
    )
    parser.add_argument(
        "--hf",
        type=Path,
        metavar="FOLDER",
        help="a Hugging Face checkpoint: config.json and safetensors, sharded or not",
    )
    parser.add_argument(
        "--hybrid-layer-pattern",
        metavar="PATTERN",
        help="SOURCE is a GPT with mHC: write it as the HybridModel of these layers, '*-' for each"
        " of its own ('*E' with experts, '+' for latent attention; no --mhc-* flags)",
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="a --save folder, or an iter_... folder in it"
    )
    parser.add_argument("target", type=Path, metavar="TARGET", help="a new folder, for --load")
    add_setting_flags(parser, (*FUNCTION_FIELDS, "init"))


def _check(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Refuse flags that do not go together.

    Raises:
        ValueError: names them.
    """
    if args.origin and args.goal:
        raise ValueError(
            f"--from {args.origin} and --to {args.goal}: ours is one end of every conversion, so"
            " convert twice"
        )
    if args.hybrid_layer_pattern is not None:
        if args.origin or args.goal:
            raise ValueError(
                "--hybrid-layer-pattern beside --from or --to: SOURCE is a GPT with mHC of ours, so"
                " convert twice"
            )
        if given:
            flags = ", ".join(map(flag_of, given))
            raise ValueError(
                f"{flags} beside --hybrid-layer-pattern: the checkpoint has the settings, drop them"
            )
    if args.hf is not None and "hf" not in (args.origin, args.goal):
        raise ValueError("--hf is for --from hf and --to hf: give one of them, or drop it")
    if args.origin == "hf" and args.hf is None:
        raise ValueError(
            "--from hf without --hf FOLDER, the Hugging Face checkpoint; SOURCE is Megatron's with"
            " the rest of the model"
        )
    if given and (args.goal or args.origin == "hf"):
        flags = ", ".join(map(flag_of, given))
        where = "config.json" if args.origin else "the checkpoint"
        raise ValueError(f"{flags} given, and {where} has the settings: drop them")
    if args.origin and "init" in given:
        raise ValueError("--mhc-init given, and the checkpoint has trained parameters: drop it")


def _run(args: argparse.Namespace) -> tuple[Path, str, list[str]]:
    """Convert; the new folder, what to do with it, and the report."""
    given = {name: getattr(args, f"mhc_{name}", None) for name in SETTINGS}
    given = {name: value for name, value in given.items() if value is not None}
    _check(args, given)
    if args.hybrid_layer_pattern is not None:
        made = convert_to_hybrid(args.source, args.target, args.hybrid_layer_pattern)
        flags = f"the GPT's --mhc flags --hybrid-layer-pattern={args.hybrid_layer_pattern}"
        return made, f"; train with {flags} --load {args.target}", []
    if args.goal == "hf":
        made, report = to_hf(args.source, args.target, args.hf)
        return made, "", report
    if args.goal == "megatron":
        made, report = to_native(args.source, args.target)
        return made, f"; train without --mhc, with --load {args.target}", report
    if args.origin == "megatron":
        made, mhc, report = from_native(args.source, args.target, given)
    elif args.origin == "hf":
        made, mhc, report = from_hf(args.source, args.target, args.hf)
    else:
        mhc, report = config_from_arguments(args), []
        made = convert(args.source, args.target, mhc)
    return made, f"; train with {flags_of(mhc)} --load {args.target}", report


def run(args: argparse.Namespace, leave: Callable[[str], Any] = sys.exit) -> None:
    """Convert, and print what was done, or leave with what is wrong."""
    try:
        made, then, report = _run(args)
    except (ValueError, OSError) as error:
        leave(f"convert: {error}")
        return
    for line in report:
        print(f"convert: {line}")
    print(f"convert: wrote {made}{then}")
