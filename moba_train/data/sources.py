"""Text inputs: folders, globs and files of plain text, JSONL or Parquet, and the embedded default corpus.

A `Corpus` can be walked several times and gives the same documents in the same order each time. A plain text file is
one document, a JSONL line is one, a Parquet row is one. Files are read one after the other, never all at once.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moba_train.config.schema import ConfigError

__all__ = [
    "JSONL_SUFFIXES",
    "PARQUET_SUFFIXES",
    "STANDARD_LIBRARY",
    "Corpus",
    "find_files",
    "json_lines",
    "parquet_rows",
    "standard_library_files",
]

STANDARD_LIBRARY = "Python standard library"
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
# Tests are long and repetitive, and site-packages differ from machine to machine.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class Corpus:
    """Documents of `files` as text, up to `max_bytes` of UTF-8 in all (whole documents; None: no bound)."""

    def __init__(self, files: Sequence[Path], *, text_key: str = "text", max_bytes: int | None = None) -> None:
        self.files, self.text_key, self.max_bytes = list(files), text_key, max_bytes
        self.skipped_files = 0  # not UTF-8; counted anew by each walk
        self.skipped_texts = 0  # null in a JSONL line or a Parquet row

    def __iter__(self) -> Iterator[str]:
        self.skipped_files = self.skipped_texts = taken = 0
        for text in self._all_texts():
            taken += len(text.encode())
            if self.max_bytes is not None and taken > self.max_bytes:
                return
            yield text

    def _all_texts(self) -> Iterator[str]:
        for file in self.files:
            suffix = file.suffix.lower()
            if suffix in JSONL_SUFFIXES:
                yield from self._jsonl(file)
            elif suffix in PARQUET_SUFFIXES:
                yield from self._parquet(file)
            else:
                try:
                    yield file.read_bytes().decode()
                except UnicodeDecodeError:
                    self.skipped_files += 1

    def _jsonl(self, file: Path) -> Iterator[str]:
        for line, record in json_lines(file):
            place = f"{file}:{line}"
            if not isinstance(record, dict) or self.text_key not in record:
                keys = ", ".join(sorted(record)) if isinstance(record, dict) else f"none: a {type(record).__name__}"
                raise ConfigError("--text-key", self.text_key, f"not among the keys of {place}: {keys}")
            yield from self._checked(record[self.text_key], place)

    def _parquet(self, file: Path) -> Iterator[str]:
        for row, record in parquet_rows(file, column=self.text_key):
            yield from self._checked(record[self.text_key], f"{file}:{row}")

    def _checked(self, value: object, place: str) -> Iterator[str]:
        if value is None:
            self.skipped_texts += 1
            return
        if not isinstance(value, str):
            raise ConfigError("--text-key", self.text_key, f"holds {type(value).__name__}, not text, in {place}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            raise ConfigError("--input", place, f"its text is not valid Unicode ({error.reason})") from error
        yield value


def json_lines(file: Path, key: str = "--input") -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of each line that is not blank; ConfigError (about `key`) names a broken one."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                remedy = f"not a line of JSON ({error}); mend or drop it"
                raise ConfigError(key, f"{file}:{number}", remedy) from error


def parquet_rows(file: Path, key: str = "--input", column: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, values by column) of each row; with `column`, that one alone. ConfigError if unreadable."""
    import pyarrow  # only this kind of input needs it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if column is not None and column not in names:
                raise ConfigError("--text-key", column, f"not among the columns of {file}: {', '.join(names)}")
            number = 0
            for rows in table.iter_batches(batch_size=1024, columns=None if column is None else [column]):
                for record in rows.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(key, str(file), f"not a readable Parquet file ({error})") from error


def find_files(inputs: Sequence[str], suffixes: Sequence[str] = (), key: str = "--input", hint: str = "") -> list[Path]:
    """The files of each input in turn: a file, a folder (all below it, hidden ones left out) or a glob, sorted by path.

    `suffixes` (".py") filters what folders and globs give; none: every file. A file found twice is taken once.
    Raises ConfigError (about `key`, ending in `hint`) for an input without files.
    """
    endings = tuple(s if s.startswith(".") else f".{s}" for s in suffixes)
    found: dict[Path, None] = {}
    for given in inputs:
        path = Path(given)
        if path.is_file():
            files = [path]
        else:
            matches = _walk(path) if path.is_dir() else map(Path, glob.glob(given, recursive=True))
            files = sorted((f for f in matches if f.is_file()), key=lambda f: f.as_posix())
            files = [f for f in files if not endings or f.name.endswith(endings)]
        if not files:
            ending = f" ending in {' or '.join(endings)}" if endings else ""
            raise ConfigError(key, given, f"no file{ending} found; give a file, a folder or a quoted glob{hint}")
        found.update(dict.fromkeys(f.resolve() for f in files))
    return list(found)


def standard_library_files() -> list[Path]:
    """The standard library's own *.py, tests and machine-made files left out, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in _walk(root, _NOT_STDLIB) if f.suffix == ".py" and not f.name.startswith("_sysconfigdata")]
    if not files:
        raise ConfigError("--input", None, f"this Python has no library sources in {root}; name a corpus with --input")
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _walk(folder: Path, leave_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in leave_out]
        yield from (Path(parent, name) for name in names if not name.startswith("."))
