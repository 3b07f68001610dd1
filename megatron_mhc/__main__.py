"""`python -m megatron_mhc doctor | plot | convert`."""

import argparse
import os
import sys
import warnings
from pathlib import Path

CONVERT = """\
Makes a start for a model with mHC from the checkpoint of an ordinary one (format torch_dist, any
parallel sizes; no GPU needed). SOURCE is only read; TARGET is written whole or not at all.

  python -m megatron_mhc convert runs/gpt/checkpoints runs/gpt-mhc/start
  torchrun ... -m megatron_mhc.run pretrain_gpt.py FLAGS --mhc --load runs/gpt-mhc/start

With --mhc-init residual the new model computes the old one's function at its first step, up to
rounding (in convention deepseek_v4 up to its eps, 1e-6 a site). Train it with the same --mhc-*
flags as are given here: they are in the checkpoint, and others are refused.

It is a start: iteration 0, a new optimizer, schedule of the learning rate and order of data. The
optimizer's state is left out, as by Megatron's --finetune; with bf16 the weights are the rounded
ones. To stop and resume, give the training its own --save, and --load that from then on."""


def _convert(args: argparse.Namespace) -> None:
    from .start.flags import config_from_arguments, flags_of
    from .tools.convert import convert

    if args.hybrid_layer_pattern is not None:
        _convert_to_hybrid(args)
        return
    try:
        mhc = config_from_arguments(args)
        made = convert(args.source, args.target, mhc)
    except (ValueError, OSError) as error:
        sys.exit(f"convert: {error}")
    print(f"convert: wrote {made}; train with {flags_of(mhc)} --load {args.target}")


def _convert_to_hybrid(args: argparse.Namespace) -> None:
    from .start.flags import given_settings
    from .tools.convert_hybrid import convert_to_hybrid

    try:
        if given := given_settings(args):
            raise ValueError(f"{given} beside --hybrid-layer-pattern: the checkpoint has settings")
        made = convert_to_hybrid(args.source, args.target, args.hybrid_layer_pattern)
    except (ValueError, OSError) as error:
        sys.exit(f"convert: {error}")
    pattern = f"--hybrid-layer-pattern={args.hybrid_layer_pattern}"
    print(f"convert: wrote {made}; train with the GPT's --mhc flags {pattern} --load {args.target}")


def check_flags(flags: list[str], parsed: argparse.Namespace) -> None:
    """`doctor --args`: the page, or exit status 2 and what is wrong with the flags."""
    # before Megatron is imported: it decides what to compile at import
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("RANK", "0")
    from megatron_mhc.patches import cpu

    with warnings.catch_warnings(action="ignore"):  # of what is not installed for training
        cpu.enter()
        from .start.activate import activate
        from .tools.dry_run import FlagsError, page
        from .tools.step_page import Assumptions

        activate()
    given = Assumptions(*(getattr(parsed, name) for name in Assumptions._fields))
    try:
        print(page(flags, given))
    except FlagsError as error:
        print(f"doctor: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Parse the command line and do what it names."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mhc",
        description="Tools of megatron_mhc. To train, use python -m megatron_mhc.run.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor", help="print versions, hooks found or missing, and every patch with its state"
    )
    doctor.add_argument(
        "--args",
        nargs=argparse.REMAINDER,
        metavar="FLAG",
        help="a training script's flags instead: check them, and print parameters, FLOPs, memory a"
        " GPU and what mHC costs a step, without training (WORLD_SIZE in the environment: how many"
        " GPUs)",
    )
    if "doctor" in sys.argv[1:2]:
        from .tools.step_page import add_assumptions

        add_assumptions(doctor)
    plot = commands.add_parser(
        "plot", help="draw loss, gradient norm, gains and H_res of runs, and a page with them"
    )
    plot.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="folders of training runs")
    plot.add_argument(
        "--output", type=Path, default=Path("mhc_plots"), help="a folder (default: mhc_plots)"
    )
    convert = commands.add_parser(
        "convert",
        help="make an ordinary model's checkpoint a start for a model with mHC",
        description=CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument(
        "source", type=Path, metavar="SOURCE", help="a --save folder, or an iter_... folder in it"
    )
    convert.add_argument("target", type=Path, metavar="TARGET", help="a new folder, for --load")
    convert.add_argument(
        "--hybrid-layer-pattern",
        metavar="PATTERN",
        help="SOURCE is a GPT with mHC: write it as the HybridModel of these layers, '*-' for each"
        " of its own ('*E' with experts, '+' for latent attention; no --mhc-* flags)",
    )
    if "convert" in sys.argv[1:2]:
        from .model.stored_settings import FUNCTION_FIELDS
        from .start.flags import add_setting_flags

        add_setting_flags(convert, (*FUNCTION_FIELDS, "init"))
    args = parser.parse_args()
    if args.command == "doctor" and args.args is not None:
        check_flags(args.args, args)
    elif args.command == "doctor":
        from .tools.doctor import page

        text, is_well = page()
        print(text)
        sys.exit(0 if is_well else 1)
    elif args.command == "convert":
        _convert(args)
    else:
        from .tools.plot_page import write_plots

        for file in write_plots(args.runs, args.output):
            print(f"plot: wrote {file}")


if __name__ == "__main__":
    main()
