"""Prints the Markdown tables of a study that run.py made; for a plan's curves, draws it too.

    python examples/stability/report.py runs/stability/tiny       # without a plan: its runs
    python examples/stability/report.py examples/stability/curves/paper_ratio --pictures FOLDER

Each table says above it what its columns are.
"""

import argparse
from pathlib import Path

from study import curves, rates_report, tables
from study.results import Result, Study


def main() -> None:
    """Reads the command line and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="a folder of runs, or of a size's curves")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw the curves there")
    args = parser.parse_args()
    if any(args.study.glob("*/run.json")):
        if args.pictures:
            parser.error("--pictures draws curves; python -m megatron_mhc plot draws these runs")
        print(rates_report.report(args.study))
        return
    study = Study([Result(one) for one in curves.load(args.study)])
    if not study.results:
        parser.error(f"no runs and no curves in {args.study}; run.py makes them")
    print(tables.report(study))
    if args.pictures:
        from study.pictures import draw

        for file in draw(study, args.pictures):
            print(f"report: wrote {file}")


if __name__ == "__main__":
    main()
