"""`python -m megatron_mhc doctor`."""

import argparse


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
    parser.parse_args()
    from .doctor import report

    print(report())


if __name__ == "__main__":
    main()
