"""`python -m megatron_mhc doctor | plot | convert`, and `--version`."""

import argparse
import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import megatron_mhc

PAGE = """\
megatron_mhc: DeepSeek's mHC (manifold-constrained hyper-connections, arXiv
2512.24880) for NVIDIA Megatron-Core: a plugin, not a fork.

Turn it on in one of three ways:
  a flag     torchrun ... -m megatron_mhc.run pretrain_gpt.py FLAGS --mhc
             (without a GPU: -m megatron_mhc.run --cpu pretrain_gpt.py ...)
  a line     import megatron_mhc.auto      in your own script, before Megatron
             parses its arguments; then the same flags
  a spec     pretrain_gpt.py FLAGS --spec megatron_mhc.spec gpt_layer_spec
             (settings: MHC_NUM_STREAMS=4 and the like in the environment)
A training run then prints a line that begins with "> mHC is on".

Tools, python -m megatron_mhc TOOL (with --help: what it takes):
  doctor                  can mHC train here? and what to paste into an issue
  doctor --args FLAGS     check a run's flags; its parameters, memory and cost
  convert SOURCE TARGET   a start with mHC from an ordinary checkpoint; models
                          of Megatron's own mHC and Hugging Face's in and out
  plot RUN ...            loss, gains and H_res of runs: PNGs and a page

Read on: python -m megatron_mhc.run --help lists every --mhc flag; README.md
and docs/ stand in the project's repository. --version says which this is."""


# warns of a CUDA toolkit without a GPU; warns that GPTModel is deprecated
TALKATIVE = ("torch.utils.cpp_extension", "megatron.core.models.gpt.gpt_model")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without warnings that are no news to who asks the doctor, as of what is not installed."""
    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def check_flags(flags: list[str], parsed: argparse.Namespace) -> None:
    """`doctor --args`: the page, or exit status 2 and what is wrong with the flags."""
    # before Megatron is imported: it decides what to compile at import
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("RANK", "0")
    from megatron_mhc.patches import cpu

    _note("imports Megatron and tries it: 10 to 40 s")
    with _quietly():
        cpu.enter()
        from .start.activate import activate
        from .tools.dry_run import FlagsError, page
        from .tools.step_page import Assumptions

        activate()
    given = Assumptions(*(getattr(parsed, name) for name in Assumptions._fields))
    try:
        with _quietly():
            text = page(flags, given)
    except FlagsError as error:
        print(f"doctor: {error}", file=sys.stderr)
        sys.exit(2)
    print(text)


def _note(what: str) -> None:
    """Why nothing is printed for a while: beside what the tool has to say."""
    print(f"({what})", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    """The commands; only what the asked-for one needs is imported."""
    parser = argparse.ArgumentParser(prog="python -m megatron_mhc", add_help=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="TOOL")
    doctor = commands.add_parser(
        "doctor",
        description="Says whether mHC can train here, then what to paste into an issue. Exit status"
        " 1: it cannot.",
    )
    doctor.add_argument(
        "--patches", action="store_true", help="list every hook and patch, those of --cpu too"
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
        "plot",
        description="Draws loss, gradient norm, gains and H_res of runs that were trained with"
        " --tensorboard-dir (gains and H_res: with --mhc-log-interval too), as PNGs and one page.",
    )
    plot.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="folders of training runs")
    plot.add_argument(
        "--output", type=Path, default=Path("mhc_plots"), help="a folder (default: mhc_plots)"
    )
    convert = commands.add_parser("convert", formatter_class=argparse.RawDescriptionHelpFormatter)
    if "convert" in sys.argv[1:2]:
        from .tools import convert_command

        convert.description = convert_command.DESCRIPTION
        convert_command.add_arguments(convert)
    return parser


def _diagnose(with_patches: bool) -> None:
    """`doctor`: the page; exit status 1 where it says ERROR."""
    _note("imports Megatron and tries it: 10 to 40 s")
    with _quietly():
        from .tools.doctor import page

        text, is_well = page(with_patches)
    print(text)
    sys.exit(0 if is_well else 1)


def main() -> None:
    """Parse the command line and do what it names."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(PAGE)
        return
    if sys.argv[1:] == ["--version"]:
        print(f"megatron_mhc {megatron_mhc.__version__}")
        return
    parser = _parser()
    args, unknown = parser.parse_known_args()
    if unknown:
        behind = "; a training run's flags stand behind --args" * (args.command == "doctor")
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{behind}")
    if args.command == "doctor" and args.args is not None:
        check_flags(args.args, args)
    elif args.command == "doctor":
        _diagnose(args.patches)
    elif args.command == "convert":
        _note("imports Megatron: some seconds")
        with _quietly():
            from .tools import convert_command
        convert_command.run(args)
    else:
        from .tools.plot_page import write_plots

        for file in write_plots(args.runs, args.output):
            print(f"plot: wrote {file}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `doctor | head` ends as other tools do
    main()
