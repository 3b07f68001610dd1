"""Writes docs/settings.md, every flag and environment variable, from the code that reads them.

python docs/tools/settings_page.py           # after a change of a flag
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_mhc import __main__ as tools  # noqa: E402
from megatron_mhc import run  # noqa: E402
from megatron_mhc.config import CONVENTION_FIELDS  # noqa: E402
from megatron_mhc.kernels.triton import tiles  # noqa: E402
from megatron_mhc.patches.registry import ENVIRONMENT_VARIABLE as PATCHES  # noqa: E402
from megatron_mhc.pipeline import deadline  # noqa: E402
from megatron_mhc.start.flags import add_mhc_arguments  # noqa: E402
from megatron_mhc.start.settings import VARIABLES, flag_of  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"
OWN = {
    PATCHES: "turns single patches off: comma-separated ids with a minus in"
    " front, `-metrics,-throughput`; an unknown id stops",
    tiles.ENVIRONMENT_VARIABLE: "a file of tiles that `benchmarks/kernels/tune.py --save` wrote;"
    " the first line of a run names it",
    deadline.VARIABLE: "how long a rank waits for its neighbours to connect with"
    f" `--mhc-overlap-p2p` before it says so and stops, in seconds (default:"
    f" {deadline.DEFAULT_SECONDS:g})",
}
OTHERS = {
    "WORLD_SIZE": "with `doctor --args`: how many GPUs the run is to have; else torchrun's",
    "RANK": "torchrun's; without it the runner makes a group of one process",
    "LOCAL_WORLD_SIZE": "torchrun's; with `--cpu` the number of devices that the stand-in shows",
    "TORCHDYNAMO_DISABLE": "set to 1 by `--cpu` and `doctor --args` where it is not set",
    "TRITON_INTERPRET": "Triton's: 1 runs the kernels on a CPU, for the tests",
}


class _CaughtError(Exception):
    pass


def parser_that(parses: Callable[[], object]) -> argparse.ArgumentParser:
    """The parser that a function builds, at the moment at which it would parse."""
    found: list[argparse.ArgumentParser] = []

    def catch(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        found.append(parser)
        raise _CaughtError

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", catch),
        contextlib.suppress(_CaughtError),
    ):
        parses()
    return found[0]


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of `python -m megatron_mhc COMMAND`, as its `main` builds it."""
    return commands(command)[command]


def commands(command: str = "") -> dict[str, argparse.ArgumentParser]:
    """All of them, by name; only the one that is called has all its flags."""
    with mock.patch.object(sys, "argv", ["megatron_mhc", command]):
        whole = parser_that(tools.main)
    return {
        name: parser
        for action in whole._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, parser in action.choices.items()
    }


def rows(actions: Iterable[argparse.Action]) -> list[str]:
    """A row of a table for each flag."""
    lines = []
    for action in actions:
        if isinstance(action, argparse._HelpAction | argparse._VersionAction):
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
        lines.append(f"| `{name}` | {_cell(text)} | {_values(action)} |")
    return lines


def _values(action: argparse.Action) -> str:
    """What may stand behind a flag: its choices, else what its help calls the value."""
    words = action.choices or ()
    if not words and action.option_strings and action.metavar:
        words = str(action.metavar).split("|")
    return ", ".join(f"`{word}`" for word in words)


def _cell(text: str) -> str:
    # what looks like a tag, a rule or emphasis stays as it is written
    return re.sub(r"([|*<])", r"\\\1", " ".join(text.split()))


def mhc_rows() -> list[str]:
    """The `--mhc*` flags, each with the variable that stands for it on the `--spec` route."""
    variables = {flag_of(field): variable for variable, field in VARIABLES.items()}
    lines = []
    parser = argparse.ArgumentParser(add_help=False)
    for action in add_mhc_arguments(parser)._actions:
        flag = action.option_strings[0]
        variable = f"`{variables[flag]}`" if flag in variables else ""
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        lines.append(f"| {names} | {variable} | {_cell(action.help or '')} | {_values(action)} |")
    return lines


def launch_rows() -> list[str]:
    """The variables of the launch scripts, from the comment at the top of launch.sh."""
    header = (ROOT / "examples" / "launch.sh").read_text()
    found = re.findall(r"^#   ([A-Z_]+(?:=\d)?(?:, [A-Z_]+)*) {2,}(.+)$", header, re.MULTILINE)
    return [
        f"| {', '.join(f'`{n}`' for n in names.split(', '))} | {_cell(t)} |" for names, t in found
    ]


def page() -> str:
    """The whole page."""
    two, three = "| --- | --- |", "| --- | --- | --- |"
    lines = [
        *("---", "hide: [toc]", "---"),
        "# Every flag and variable",
        "",
        "<!-- Written by docs/tools/settings_page.py; do not edit. -->",
        "",
        "## mHC's flags",
        "",
        "With the runner and with `import megatron_mhc.auto`. The variable stands for the flag"
        " where `--spec megatron_mhc.spec ...` turns mHC on; it is refused beside flags. Switches"
        " are 0 or 1 there. The flags from "
        f"`{flag_of(CONVENTION_FIELDS[0])}` to `{flag_of(CONVENTION_FIELDS[-1])}` are fields of the"
        " [convention](conventions.md).",
        "",
        "| flag | variable | what it does | values |",
        "| --- | --- | --- | --- |",
        *mhc_rows(),
        "",
        "## The runner",
        "",
        "`[torchrun ...] -m megatron_mhc.run [--cpu] SCRIPT <the script's and Megatron's flags>`",
        "",
        "| flag | what it does | values |",
        three,
        *rows(parser_that(lambda: run._parse(["SCRIPT"]))._actions),
        "",
    ]
    for command in commands():
        lines += [f"## `{command}`", "", f"`python -m megatron_mhc {command}`", ""]
        lines += ["| flag | what it does | values |", three]
        lines += [*rows(parser_of(command)._actions), ""]
    lines += ["## Environment variables", "", "| variable | what it does |", two]
    lines += [f"| `{name}` | {text} |" for name, text in OWN.items()]
    lines += ["", "Of others, where the plugin looks at them:", "", "| variable | what for |", two]
    lines += [f"| `{name}` | {text} |" for name, text in OTHERS.items()]
    lines += ["", "## Launch scripts", "", "Of `examples/*/*.sh` and `make train`.", ""]
    lines += ["| variable | what it does |", two, *launch_rows()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))
