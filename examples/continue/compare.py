"""Prints how far training has moved hyper-connections that came from Hugging Face's format.

    python examples/continue/compare.py HF START CHECKPOINTS TRAINED

HF was imported into START; CHECKPOINTS is the --save folder of a training that began there, and
TRAINED what its last one was exported to. Ends with status 1 if START does not have the numbers of
HF, or TRAINED not those of the last checkpoint: nothing was rounded on the way.
"""

import argparse
import sys
from pathlib import Path

from torch import Tensor

from megatron_mhc.tools import hf_sites
from megatron_mhc.tools.convert import find_checkpoint, read_metadata
from megatron_mhc.tools.site_items import Layout, Sites, read_sites


def numbers(sites: Sites) -> dict[object, Tensor]:
    """All parameters, by layer and name; the head's by name."""
    return {**sites.layers, **sites.head}


def of_hf(folder: Path) -> dict[object, Tensor]:
    """The hyper-connections of a folder of safetensors, in our order of rows."""
    return numbers(hf_sites.read_sites(folder)[1])


def of_megatron(folder: Path) -> dict[object, Tensor]:
    """Those of a checkpoint."""
    metadata = read_metadata(folder)
    return numbers(read_sites(folder, metadata, Layout(metadata.state_dict_metadata))[1])


def difference(one: dict[object, Tensor], other: dict[object, Tensor]) -> float:
    """The largest between two numbers in the same place."""
    assert one.keys() == other.keys()
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def main() -> None:
    """Reads the command line and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("hf", "start", "checkpoints", "trained"):
        parser.add_argument(name, type=Path, metavar=name.upper())
    args = parser.parse_args()
    imported, trained = of_hf(args.hf), of_hf(args.trained)
    iterations = sorted(args.checkpoints.glob("iter_*"))
    folders = [find_checkpoint(args.start), *iterations]
    found = [of_megatron(folder) for folder in folders]
    largest = max(float(value.abs().max()) for value in imported.values())
    print(f"compare: {len(imported)} tensors in {args.hf}, numbers up to {largest:.2f}; from these")
    for folder, one in zip(folders, found, strict=True):
        print(f"compare: {difference(imported, one):.2e} at most in {folder}")
    lost = difference(found[-1], trained)
    print(f"compare: {lost:.2e} at most from {folders[-1]} to {args.trained}")
    if difference(imported, found[0]) or lost:
        sys.exit("compare: numbers were changed by the import or the export, see above")


if __name__ == "__main__":
    main()
