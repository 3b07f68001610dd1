"""Text from installed packages: sources and documentation, every file and every paragraph once."""

import hashlib
import multiprocessing
import os
import re
import sysconfig
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SUFFIXES = {
    *(".py", ".pyi", ".pyx", ".pxd", ".md", ".rst", ".txt"),
    *(".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu", ".inl", ".jl", ".f90"),
}
LARGEST_FILE = 1_000_000
"""Bytes; larger files are tables."""
LONGEST_LINES = 200
"""Characters, the mean of a file; above it stands what no person wrote."""
SHORTEST = 200
"""Characters that must be left of a file."""
HELD_OUT = 0.02
"""The share of the bytes that is kept for validation."""
SKIPPED = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
OWN = re.compile(r"__editable__|megatron_mhc|_distutils_hack")
"""What an installation of this project leaves there: it differs from machine to machine."""
BLANK_LINES = re.compile(r"\n\s*\n")


class File(NamedTuple):
    """A file that may be read: its package, its path below the root, the root, its bytes."""

    package: str
    path: str
    root: str
    size: int


class Document(NamedTuple):
    """What is left of a file."""

    package: str
    path: str
    text: str


def default_roots() -> list[Path]:
    """The folders of installed packages and of the standard library."""
    names = ("purelib", "platlib", "stdlib")
    return list(dict.fromkeys(Path(sysconfig.get_path(name)) for name in names))


def package_of(path: str) -> str:
    """`torch/nn/init.py`, `torch-2.9.dist-info/LICENSE.txt` -> torch; `six.py` -> six."""
    return re.split(r"[-.]", path.split("/")[0].lower())[0]


def candidates(roots: list[Path]) -> list[File]:
    """Every file that may be read, in an order that does not depend on where the roots lie."""
    found = []
    for root in roots:
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in SKIPPED]
            for name in files:
                whole = os.path.join(folder, name)
                path = os.path.relpath(whole, root).replace(os.sep, "/")
                if os.path.splitext(name)[1].lower() not in SUFFIXES or OWN.match(path):
                    continue
                size = os.path.getsize(whole) if os.path.isfile(whole) else 0
                if SHORTEST <= size <= LARGEST_FILE:
                    found.append(File(package_of(path), path, str(root), size))
    return sorted(found)


def by_name(packages: dict[str, int]) -> list[str]:
    """Packages in the order of the SHA-256 of their names: an order that nobody chose."""
    return sorted(packages, key=lambda name: hashlib.sha256(name.encode()).digest())


def sizes(files: list[File]) -> dict[str, int]:
    """The bytes of every package."""
    bytes_of: dict[str, int] = {}
    for file in files:
        bytes_of[file.package] = bytes_of.get(file.package, 0) + file.size
    return bytes_of


def at_most(files: list[File], limit: int) -> list[File]:
    """The files of the first packages `by_name` that have no more than `limit` bytes together."""
    left, kept, bytes_of = limit, set(), sizes(files)
    for package in by_name(bytes_of):
        if bytes_of[package] <= left:
            left -= bytes_of[package]
            kept.add(package)
    return [file for file in files if file.package in kept]


def held_out(bytes_of: dict[str, int], share: float = HELD_OUT) -> set[str]:
    """The packages for validation: those first `by_name`, until they have `share` of all bytes.

    One that has more than a quarter of that share by itself is passed over, so that validation
    does not depend on one package.
    """
    limit = share * sum(bytes_of.values())
    taken: set[str] = set()
    for package in by_name(bytes_of):
        if sum(bytes_of[name] for name in taken) >= limit:
            break
        if bytes_of[package] <= limit / 4:
            taken.add(package)
    return taken


def paragraphs(text: str) -> list[str]:
    """What stands between blank lines."""
    return [part.rstrip() for part in BLANK_LINES.split(text.lstrip("\n")) if part.strip()]


def key(paragraph: str) -> int:
    """64 bits of a hash; paragraphs that differ in white space alone have the same."""
    digest = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def read(file: File) -> tuple[str, bytes]:
    """A file's text and its paragraphs' keys; both empty where it is no text that we want."""
    try:
        text = Path(file.root, file.path).read_bytes().decode()
    except UnicodeDecodeError:
        return "", b""
    text = text.replace("\r\n", "\n")
    if "\0" in text or len(text) > LONGEST_LINES * (text.count("\n") + 1):
        return "", b""
    return text, array("Q", map(key, paragraphs(text))).tobytes()


def documents(files: list[File], processes: int, seen: set[int]) -> Iterator[Document]:
    """What is left of the files once all that was `seen` is gone; adds to `seen`.

    A file that occurs twice has no new paragraph the second time.
    """
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for file, (text, packed) in zip(files, pool.imap(read, files, chunksize=64), strict=True):
            kept = []
            for paragraph, one in zip(paragraphs(text), array("Q", packed), strict=True):
                if one not in seen:
                    seen.add(one)
                    kept.append(paragraph)
            left = "\n\n".join(kept)
            if len(left) >= SHORTEST:
                yield Document(file.package, file.path, left + "\n")
