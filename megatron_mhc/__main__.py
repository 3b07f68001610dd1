"""`python -m megatron_mhc doctor | plot`."""

import argparse
from pathlib import Path


def main() -> None:
    """Parse the command line and do what it names."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mhc",
        description="Tools of megatron_mhc. To train, use python -m megatron_mhc.run.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "doctor", help="print versions, hooks found or missing, and every patch with its state"
    )
    plot = commands.add_parser(
        "plot", help="draw loss, gradient norm, gains and H_res of runs, and a page with them"
    )
    plot.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="folders of training runs")
    plot.add_argument(
        "--output", type=Path, default=Path("mhc_plots"), help="a folder (default: mhc_plots)"
    )
    args = parser.parse_args()
    if args.command == "doctor":
        from .doctor import report

        print(report())
    else:
        from .plot import write_plots

        for file in write_plots(args.runs, args.output):
            print(f"plot: wrote {file}")


if __name__ == "__main__":
    main()
