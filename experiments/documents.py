#!/usr/bin/env python3
"""Real long documents: the Python sources of installed packages, neighbouring files joined until they are long.

    python experiments/documents.py --output data/long.jsonl

A document is whole files of one package in path order, each after a comment with its path, until there are
--characters; a shorter rest is kept where it has a third of them. Packages are the standard library's and those
installed beside it, without tests; files that are not UTF-8 or very large (tables, generated code) are left out. Of the
documents, shuffled, as many are written as --megabytes hold.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from moba_train.config.arguments import argument_parser

LARGEST_FILE = 300_000  # bytes
_LEFT_OUT = frozenset({"test", "tests", "testing", "__pycache__", "site-packages", "dist-packages", "encodings"})


def main() -> int:
    args = parse_arguments()
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    documents = list(dict.fromkeys(long_documents(roots, args.characters)))
    random.Random(0).shuffle(documents)  # not by a hash of the text, which decides what is for validation
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_name(args.output.name + ".partial")
    written = size = 0
    with partial.open("w", encoding="utf-8") as lines:
        for text in documents:
            size += len(text)
            if size > args.megabytes * 1e6:
                break
            lines.write(json.dumps({"text": text}) + "\n")
            written += 1
    if written < 2:
        partial.unlink()
        print(f"error: {len(documents)} documents of that length: fewer --characters", file=sys.stderr)
        return 2
    partial.rename(args.output)
    print(f"{args.output}: {written} of {len(documents)} documents")
    return 0


def long_documents(roots: list[Path], characters: int) -> Iterator[str]:
    """The documents of every package below the roots, in path order."""
    for root in roots:
        files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
        kept = [path for path in files if not _LEFT_OUT.intersection(path.parts)]
        # A root's own files are one package.
        for _, package in groupby(kept, key=lambda path: path.parts[0] if len(path.parts) > 1 else ""):
            yield from _joined(root, list(package), characters)


def _joined(root: Path, files: list[Path], characters: int) -> Iterator[str]:
    parts: list[str] = []
    for path in files:
        if (root / path).stat().st_size > LARGEST_FILE:
            continue
        try:
            source = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if source.strip():
            parts.append(f"# {path.as_posix()}\n{source}\n")
        if sum(map(len, parts)) >= characters:
            yield "".join(parts)
            parts = []
    if sum(map(len, parts)) >= characters // 3:
        yield "".join(parts)


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE", help="the JSONL file to make")
    add("--characters", type=int, default=420_000, metavar="N", help="of a document (default: 420000)")
    add("--megabytes", type=float, default=48, metavar="MB", help="in all, in 10^6 characters (default: 48)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
