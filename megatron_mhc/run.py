"""Run a Megatron training script with the --mhc flags: `python -m megatron_mhc.run SCRIPT ...`."""

import argparse
import os
import runpy
import sys
import traceback
from collections.abc import Sequence

import torch

from megatron_mhc.patches.supported_versions import check_release

from .start.flags import add_mhc_arguments
from .start.refusals import REFUSALS, NotMegatronError

USAGE = (
    "[torchrun ...] -m megatron_mhc.run [--cpu] SCRIPT [the script's and Megatron's flags] --mhc"
)
DESCRIPTION = """\
Runs an unmodified Megatron script (pretrain_gpt.py, say) that has learnt the flag --mhc:

  torchrun --nproc-per-node 8 -m megatron_mhc.run pretrain_gpt.py <flags> --mhc
  python -m megatron_mhc.run --cpu pretrain_gpt.py <flags> --mhc

Without --mhc the script runs as it always does."""


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="megatron_mhc.run",
        usage=USAGE,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="train on the CPU, over gloo: slow, for trying and testing",
    )
    parser.add_argument("script", metavar="SCRIPT", help="the training script")
    own = list(argv)
    early = [word for word in own[:1] if word.startswith("--mhc")]
    if early:
        parser.error(f"{early[0]} stands in front of SCRIPT: it belongs behind it, with its flags")
    # what follows the script is the script's: argparse must not look at it
    cut = next((i for i, word in enumerate(own) if not word.startswith("-")), len(own) - 1) + 1
    if {"-h", "--help"} & {*own[:cut]}:
        # to be seen and not to be parsed: these flags come after the script
        parser = add_mhc_arguments(parser)
    options = parser.parse_args(own[:cut])
    if not os.path.isfile(options.script):
        parser.error(f"there is no file {options.script!r}")
    return options, own[cut:]


def _alone() -> None:
    """Without torchrun: a group of one, so that `python -m megatron_mhc.run` is enough."""
    if "RANK" not in os.environ:
        # port 0: the store takes a free one, which a group of one need not know
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m megatron_mhc.run`.

    Raises:
        SystemExit: bad usage, or no GPU and no --cpu.
        UnsupportedMegatronError: Megatron-Core is missing or of a release that is not supported.
        FlagsError: mHC refuses the run's flags.
        DenseModelError: Megatron built a model without mHC.
        PatchError: something that a patch changes is not there.
        NotMegatronError: the script is not one of Megatron's, or built a model without mHC that
            no check of Megatron's training saw.
    """
    options, rest = _parse(sys.argv[1:] if argv is None else argv)
    # as `python SCRIPT` has it, before a Megatron is looked for: one may stand beside the script
    sys.path[0] = os.path.dirname(os.path.abspath(options.script))
    check_release()
    if options.cpu:
        # before Megatron is imported: it decides what to compile at import
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from megatron_mhc.patches import cpu

        cpu.enter()
    elif not torch.cuda.is_available():
        where = "move --cpu in front of" if "--cpu" in rest else "add --cpu in front of"
        sys.exit(
            f"megatron_mhc.run: there is no CUDA device here; {where} {options.script} to train on"
            " the CPU"
        )
    from .start.activate import activate

    activate()
    _alone()
    sys.argv = [options.script, *rest]
    try:
        runpy.run_path(options.script, run_name="__main__")
    except SystemExit as end:
        if end.code in (None, 0) and not _came_from_megatron(end):
            _last_word(options.script)
        raise
    _last_word(options.script)


def _came_from_megatron(end: SystemExit) -> bool:
    """Whether Megatron ended the run itself: on a signal, say, before there was a model."""
    last = list(traceback.walk_tb(end.__traceback__))[-1][0]
    return str(last.f_globals.get("__name__")).startswith("megatron.")


def _last_word(script: str) -> None:
    """Raise NotMegatronError if the script that ended can have had no mHC in it."""
    from .start.activate import seen

    if not seen.parser:
        raise NotMegatronError(
            f"{script} ended without asking Megatron for its arguments"
            " (megatron.training.arguments.add_megatron_arguments): no mHC was in it. Give a script"
            " that calls megatron.training, or use with_mhc in the script itself"
        )
    if not seen.asked:
        return
    from .model.layer import MHCLayer

    if not MHCLayer.is_any_built:
        raise NotMegatronError(
            f"{script} got --mhc and ended without a layer with mHC: what it trained had none. Give"
            " a script whose model megatron.training builds, or use with_mhc in the script itself"
        )


def _in_a_sentence() -> None:
    """`main`; what is refused is printed without a traceback."""
    try:
        main()
    except REFUSALS as error:
        sys.exit(f"megatron_mhc.run: {error}")


if __name__ == "__main__":
    _in_a_sentence()
