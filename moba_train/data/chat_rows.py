"""Tokenised chat rows, made once and memory-mapped by every process.

    <cache>/sft-<hash>/   tokens.bin, loss.bin (one byte a token), rows.npy, info.json

The hash is of the tokenizer, the template, what carries loss, and path, size and time of every file; so whoever asks
for the same rows finds them, and a changed file is tokenised anew. The folder appears whole or not at all. Rank 0
makes it, the others wait for it without a process group: a broken row is refused before there is one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from moba_train.config.schema import ConfigError
from moba_train.data.chat import Conversation, chat_files, read_conversations
from moba_train.data.chat_template import ChatTokenizer
from moba_train.data.split import text_hash

__all__ = ["ChatRows", "tokenised_rows"]

_FORMAT = 1
_BATCH_CHARACTERS = 1 << 22  # of messages tokenised at a time
_POLL_S = 0.2
_ROW = np.dtype(
    [("start", "<i8"), ("length", "<i8"), ("file", "<i4"), ("line", "<i8"), ("hash", "<u8"), ("document", "<u8")]
)


@dataclass(frozen=True)
class ChatRows:
    """Tokenised rows of one set of files. table: a record of _ROW for each row that has a loss token."""

    folder: Path
    files: list[str]
    table: np.ndarray
    without_loss: int  # rows that were left out, as no token of them carries loss
    vocab_size: int

    def __len__(self) -> int:
        return len(self.table)

    def place(self, row: int) -> str:
        """file:line of a row."""
        return f"{self.files[self.table['file'][row]]}:{self.table['line'][row]}"

    def ids(self, row: int, count: int) -> np.ndarray:
        """The first `count` tokens of a row, int64."""
        start = self.table["start"][row]
        return self._tokens[start : start + count].astype(np.int64)

    def loss(self, row: int, count: int) -> np.ndarray:
        """Which of the first `count` tokens carry loss as an answer, bool."""
        start = self.table["start"][row]
        return self._loss[start : start + count].astype(bool)

    @cached_property
    def _tokens(self) -> np.memmap:
        return np.memmap(self.folder / "tokens.bin", dtype=_token_dtype(self.vocab_size), mode="r")

    @cached_property
    def _loss(self) -> np.memmap:
        return np.memmap(self.folder / "loss.bin", dtype=np.uint8, mode="r")


def tokenised_rows(
    path: str, tokenizer: ChatTokenizer, *, key: str = "sft.path", cache_dir: str | None = None, timeout_s: float = 600
) -> ChatRows:
    """The rows of a file, folder or glob, from the cache or tokenised now (rank 0) or soon (the others wait for it).

    Raises ConfigError for a broken row, by file:line; where no row has a loss token; where the cache cannot be written;
    and, after `timeout_s` without a sign of rank 0's work, where its cache is not shared with this process.
    """
    files = chat_files(path, key)
    root = Path(cache_dir) if cache_dir is not None else files[0].parent / "cache"
    folder = root / f"sft-{_identity(files, tokenizer)[:24]}"
    if not _whole(folder):
        if os.environ.get("RANK", "0") == "0":
            _tokenise(folder, files, tokenizer, key)
        else:
            _wait_for(folder, timeout_s)
    rows = _open(folder)
    if not len(rows):
        what = "it has no rows"
        if rows.without_loss:
            template = f"or {tokenizer.source} chat template writes none"
            what = f"none of its {rows.without_loss} rows has an assistant turn with text, {template}"
        raise ConfigError(key, path, f"{what}; give chat rows as data/README.md describes")
    return rows


def _identity(files: list[Path], tokenizer: ChatTokenizer) -> str:
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((_FORMAT, tokenizer.identity, stats)).encode()).hexdigest()


def _whole(folder: Path) -> bool:
    return (folder / "info.json").is_file()


def _open(folder: Path) -> ChatRows:
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    return ChatRows(folder=folder, table=np.load(folder / "rows.npy"), **info)


def _tokenise(folder: Path, files: list[Path], tokenizer: ChatTokenizer, key: str) -> None:
    partial = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "data.cache_dir", str(folder.parent), f"cannot be written ({error}); name a folder"
        ) from error
    try:
        _write(partial, files, tokenizer, key)
        try:
            partial.rename(folder)
        except OSError:
            if not _whole(folder):  # else another run made the same rows meanwhile
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(partial: Path, files: list[Path], tokenizer: ChatTokenizer, key: str) -> None:
    numbers = {file: number for number, file in enumerate(files)}
    dtype = _token_dtype(tokenizer.vocab_size)
    records: list[tuple[int, ...]] = []
    start = without_loss = 0
    with (partial / "tokens.bin").open("wb") as tokens, (partial / "loss.bin").open("wb") as losses:
        for batch in _batches(read_conversations(files, key)):
            for row, encoded in zip(batch, tokenizer.encode(batch), strict=True):
                if not encoded.loss[1:].any():  # the first token answers nothing
                    without_loss += 1
                    continue
                length = len(encoded.ids)
                content = text_hash(encoded.text)
                document = content if row.document is None else text_hash(row.document)
                records.append((start, length, numbers[row.file], row.line, content, document))
                tokens.write(encoded.ids.astype(dtype).tobytes())
                losses.write(encoded.loss.astype(np.uint8).tobytes())
                start += length
            tokens.flush()  # who waits for these rows sees that they are being made
        if not records:  # a file without content cannot be memory-mapped
            tokens.write(bytes(8))
            losses.write(bytes(8))
    np.save(partial / "rows.npy", np.array(records, dtype=_ROW))
    info = {
        "files": [str(file) for file in files],
        "without_loss": without_loss,
        "vocab_size": tokenizer.vocab_size,
    }
    (partial / "info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


def _batches(conversations: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    batch: list[Conversation] = []
    size = 0
    for conversation in conversations:
        batch.append(conversation)
        size += sum(len(str(message.get("content", ""))) for message in conversation.messages)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _wait_for(folder: Path, timeout_s: float) -> None:
    """Until rank 0 has made `folder`. It may take long, but never without growing for `timeout_s`."""
    seen, since = None, time.monotonic()
    while not _whole(folder):
        partial = sorted(itertools.chain.from_iterable(p.glob("*") for p in _partials(folder)))
        signs = [(str(file), file.stat().st_size) for file in partial if file.exists()]
        if signs != seen:
            seen, since = signs, time.monotonic()
        if time.monotonic() - since > timeout_s:
            remedy = "rank 0's tokenised rows do not appear here; name a folder that all nodes share"
            raise ConfigError("data.cache_dir", str(folder.parent), remedy)
        time.sleep(_POLL_S)


def _partials(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f".{folder.name}.partial-*")) if folder.parent.is_dir() else []


def _token_dtype(vocab_size: int) -> type[np.integer]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32
