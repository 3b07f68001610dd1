"""Makes the text of the study from installed packages, without a download.

    python examples/stability/prepare_text.py --output runs/stability/data/paper_ratio

Sources and documentation of every installed package and of the standard library; every paragraph
occurs once (one in a held-out package only if no training text has it); a byte-level BPE tokenizer
trained on the training text; held-out packages for validation (`study/text.py` has the rules).
Writes `train` and `valid` as Megatron's indexed datasets, `tokenizer.json` and `data.json`, whose
digest says whether two machines made the same data.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from study import text

TOKENIZER_BYTES = 24_000_000
"""The tokenizer is trained on so much of the training text: every k-th document."""
BATCH = 1000
"""Documents that are tokenized at once."""
START = time.monotonic()


def say(message: str) -> None:
    """Print, with the seconds since the start."""
    print(f"prepare_text: {time.monotonic() - START:5.1f} s: {message}", flush=True)


def train_tokenizer(documents: list[text.Document], vocab_size: int) -> Any:
    """A byte-level BPE; its ids end before `vocab_size - 1`, the end of a document."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ModuleNotFoundError:
        raise SystemExit(
            "prepare_text: tokenizers is not installed: pip install 'tokenizers>=0.21'"
        ) from None

    total = sum(len(document.text) for document in documents)
    every = -(-total // TOKENIZER_BYTES)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),  # on standard error, as ours
    )
    tokenizer.train_from_iterator((d.text for d in documents[::every]), trainer)
    return tokenizer


def write(documents: list[text.Document], tokenizer: Any, vocab_size: int, prefix: Path) -> int:
    """Write an indexed dataset; returns its number of tokens."""
    with warnings.catch_warnings(action="ignore"):
        import torch
        from megatron.core.datasets import indexed_dataset
    from megatron_mhc.tools.progress import progress

    builder = indexed_dataset.IndexedDatasetBuilder(
        indexed_dataset.get_bin_path(str(prefix)), dtype=np.uint16
    )
    total = 0
    with progress(f"prepare_text: {prefix.name}", len(documents), "documents") as bar:
        for first in range(0, len(documents), BATCH):
            batch = [document.text for document in documents[first : first + BATCH]]
            for encoding in tokenizer.encode_batch_fast(batch):
                tokens = np.append(np.array(encoding.ids, dtype=np.int64), vocab_size - 1)
                builder.add_document(torch.from_numpy(tokens), [tokens.size])
                total += tokens.size
            bar.update(len(batch))
    builder.finalize(indexed_dataset.get_idx_path(str(prefix)))
    return total


def digest(files: Iterable[Path]) -> str:
    """SHA-256 over what the files hold."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.read_bytes())
    return whole.hexdigest()


def build(roots: list[Path], output: Path, vocab_size: int, limit: int | None) -> dict[str, Any]:
    """Make the data; returns what data.json holds."""
    files = text.candidates(roots)
    if limit is not None:
        files = text.at_most(files, limit)
    packages = text.sizes(files)
    held = text.held_out(packages)
    if not held:
        raise SystemExit(
            f"prepare_text: {len(packages)} packages are too few to hold one out for validation:"
            " give folders of more with --roots"
        )
    say(f"{len(files)} files of {len(packages)} packages, {len(held)} packages held out")
    seen: set[int] = set()
    processes = os.cpu_count() or 1
    parts = {"train": [f for f in files if f.package not in held]}
    parts["valid"] = [f for f in files if f.package in held]
    # training first: what both have is then no part of validation
    left = {name: list(text.documents(part, processes, seen)) for name, part in parts.items()}
    say(f"{len(seen):,} paragraphs; training a tokenizer of {vocab_size}")
    tokenizer = train_tokenizer(left["train"], vocab_size)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    made: dict[str, Any] = {"vocab_size": vocab_size, "held_out": sorted(held)}
    for name, documents in left.items():
        made[f"{name}_bytes"] = sum(len(document.text.encode()) for document in documents)
        made[f"{name}_documents"] = len(documents)
        made[f"{name}_tokens"] = write(documents, tokenizer, vocab_size, output / name)
    made["digest"] = digest(output / n for n in ("train.bin", "valid.bin", "tokenizer.json"))
    # written last: its presence says that the others are whole
    (output / "data.json").write_text(json.dumps(made, indent=2) + "\n")
    return made


def main() -> None:
    """Makes the data unless it is there already, and prints what it holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--roots", type=Path, nargs="+", help="folders of packages (default: those of this Python)"
    )
    parser.add_argument("--vocab-size", type=int, default=16384, help="default: %(default)s")
    parser.add_argument("--megabytes", type=float, help="at most so much (default: all)")
    parser.add_argument("--digest", help="stop with an error if the data have another one")
    args = parser.parse_args()
    for root in args.roots or []:
        if not root.is_dir():
            parser.error(f"--roots {root} is not a folder: give one whose folders are packages")
    written = args.output / "data.json"
    if written.exists():
        made = json.loads(written.read_text())
        if made["vocab_size"] != args.vocab_size:
            sys.exit(
                f"prepare_text: {args.output} has a vocabulary of {made['vocab_size']}, and"
                f" --vocab-size is {args.vocab_size}: give that size, or another --output"
            )
    else:
        limit = None if args.megabytes is None else int(args.megabytes * 1e6)
        made = build(args.roots or text.default_roots(), args.output, args.vocab_size, limit)
    say(
        f"{made['train_tokens']:,} tokens ({made['train_bytes']:,} bytes) to train on,"
        f" {made['valid_tokens']:,} held out; digest {made['digest']}"
    )
    if args.digest and args.digest != made["digest"]:
        sys.exit(
            f"prepare_text: the digest is {made['digest']}, and --digest {args.digest}: other"
            " packages are installed, or other versions of them; give the same ones by --roots, or"
            " drop --digest and train all runs on these data"
        )


if __name__ == "__main__":
    main()
