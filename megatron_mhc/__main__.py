"""`python -m megatron_mhc doctor | plot | convert`."""

import argparse
import os
import sys
import warnings
from pathlib import Path


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
        help="make a start for a model with mHC of an ordinary model's checkpoint, Megatron's own"
        " mHC or of Hugging Face's, and the way back",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if "convert" in sys.argv[1:2]:
        from .tools import convert_command

        convert.description = convert_command.DESCRIPTION
        convert_command.add_arguments(convert)
    args = parser.parse_args()
    if args.command == "doctor" and args.args is not None:
        check_flags(args.args, args)
    elif args.command == "doctor":
        from .tools.doctor import page

        text, is_well = page()
        print(text)
        sys.exit(0 if is_well else 1)
    elif args.command == "convert":
        convert_command.run(args)
    else:
        from .tools.plot_page import write_plots

        for file in write_plots(args.runs, args.output):
            print(f"plot: wrote {file}")


if __name__ == "__main__":
    main()
