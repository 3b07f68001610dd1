"""Makes a small real text corpus without a download: the sources of Python's standard library.

Or, with `--with-packages`, of the installed packages too. Each `.py` file is one document, one
token a byte (0 to 255), closed by an end-of-document token (256), written as Megatron's indexed
dataset:

    python examples/prepare_data.py --output runs/data/stdlib
    ... pretrain_gpt.py --data-path runs/data/stdlib --tokenizer-type NullTokenizer --vocab-size 257

Prints the unigram entropy of the bytes in nats: the loss of the best model that ignores context,
so a model that has learned anything of Python is below it. `OUTPUT.json` keeps the figures.
"""

import argparse
import json
import sysconfig
import warnings
from pathlib import Path

import numpy as np

END_OF_DOCUMENT = 256
VOCAB_SIZE = END_OF_DOCUMENT + 1
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
TABLES = {"encodings", "pydoc_data"}
TESTS = {"test", "tests", "idle_test"}


def source_files(root: Path, with_tests: bool = False) -> list[Path]:
    """The non-empty Python files under `root`, relative to it and sorted.

    Installed packages are left out, and so are tables that are Python in name only.
    """
    skipped = NOT_THE_LIBRARY | TABLES | (set() if with_tests else TESTS)
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in files if not skipped.intersection(path.parts))
    return sorted((p for p in kept if (root / p).stat().st_size), key=lambda path: path.as_posix())


def unigram_entropy(counts: np.ndarray) -> float:
    """The entropy in nats of the distribution that `counts` describes."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def build(
    roots: list[Path], output: Path, with_tests: bool = False
) -> dict[str, int | float | str]:
    """Writes `output`.bin, .idx and .json; returns what the JSON holds."""
    # Imported here, because it takes seconds and a rerun needs none of it; it warns of what is
    # missing for training.
    with warnings.catch_warnings(action="ignore"):
        import torch
        from megatron.core.datasets import indexed_dataset
    from megatron_mhc.tools.progress import progress

    files = [root / path for root in roots for path in source_files(root, with_tests)]
    if not files:
        raise SystemExit(
            f"prepare_data: no Python files under {roots[0]}: give another folder with --source"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    builder = indexed_dataset.IndexedDatasetBuilder(
        indexed_dataset.get_bin_path(str(output)), dtype=np.uint16
    )
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    with progress("prepare_data: reading", len(files), "files") as bar:
        for path in files:
            tokens = np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int64)
            tokens = np.append(tokens, END_OF_DOCUMENT)
            counts += np.bincount(tokens, minlength=VOCAB_SIZE)
            builder.add_document(torch.from_numpy(tokens), [tokens.size])
            bar.update()
    builder.finalize(indexed_dataset.get_idx_path(str(output)))
    summary: dict[str, int | float | str] = {
        "source": ", ".join(str(root) for root in roots),
        "with_tests": with_tests,
        "bytes": int(counts[:END_OF_DOCUMENT].sum()),
        "documents": len(files),
        "vocab_size": VOCAB_SIZE,
        "end_of_document": END_OF_DOCUMENT,
        "unigram_entropy_nats": unigram_entropy(counts[:END_OF_DOCUMENT]),
    }
    # Written last: its presence says that the other two are whole.
    output.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> None:
    """Builds the dataset unless it is there already, and prints what it holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="prefix of the files to write")
    parser.add_argument(
        "--source", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder to read"
    )
    parser.add_argument("--with-tests", action="store_true", help="take test folders as well")
    parser.add_argument(
        "--with-packages", action="store_true", help="take the installed packages as well"
    )
    parser.add_argument("--force", action="store_true", help="build even if it is there already")
    args = parser.parse_args()
    if not args.source.is_dir():
        parser.error(f"--source {args.source} is not a folder: give one with Python files")
    written = args.output.with_suffix(".json")
    if written.exists() and not args.force:
        summary = json.loads(written.read_text())
        print(f"prepare_data: {args.output} is there already (--force builds it again)")
    else:
        packages = [Path(sysconfig.get_path("purelib"))] if args.with_packages else []
        summary = build([args.source, *packages], args.output, args.with_tests)
    print(
        f"prepare_data: {summary['bytes']:,} bytes in {summary['documents']:,} documents, "
        f"unigram entropy {summary['unigram_entropy_nats']:.4f} nats a byte"
    )


if __name__ == "__main__":
    main()
