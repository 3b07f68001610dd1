"""What the scripts' command lines share."""

import argparse

NUMBERS = {
    "tokens": "T, tokens of a site",
    "width": "C, the width of a stream",
    "layers": "transformer layers",
    "hidden": "C, the width of a stream",
    "ffn": "width of the MLP inside",
    "heads": "attention heads",
    "groups": "groups of keys and values",
    "sequence": "tokens of a sequence",
    "batch": "sequences of a microbatch",
    "microbatches": "of a step",
    "stages": "of the pipeline",
    "stage": "which of them this one is, from 0",
    "steps": "that are timed at a time",
    "rounds": "of all cases, one after the other",
}
"""What a number of the command line means, by the name of its flag."""
GPT = {"layers": 8, "hidden": 4096, "ffn": 14336, "heads": 32, "groups": 8, "sequence": 4096}
"""The sizes of the model that is measured, where the command line says nothing else."""
SITE = {"tokens": 8192, "width": 4096}
"""The size of a site, likewise."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose --help begins with a script's docstring, line by line."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parse_on_gpu(of: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says; where there is no CUDA device the script ends here."""
    import torch  # --help does without

    options = of.parse_args()
    if not torch.cuda.is_available():
        of.exit(1, f"{of.prog}: a CUDA device is needed, and PyTorch finds none\n")
    return options


def add_numbers(to: argparse.ArgumentParser, defaults: dict[str, int]) -> None:
    """A flag for each whole number; `NUMBERS` says what it means."""
    for name, default in defaults.items():
        meaning = f"{NUMBERS[name]} (default: {default})"
        to.add_argument(f"--{name}", type=int, default=default, help=meaning)


def add_list(to: argparse.ArgumentParser, name: str, default: list[int], meaning: str) -> None:
    """A flag that takes several whole numbers, each of which is measured."""
    meaning = f"{meaning} (default: {' '.join(map(str, default))})"
    to.add_argument(f"--{name}", type=int, nargs="*", default=default, metavar="N", help=meaning)
