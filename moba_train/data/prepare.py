"""Text to a prepared folder: train.bin/.idx and valid.bin/.idx in megatron-core's format, tokenizer/, dataset.json.

Invariants:
  - every document ends with one EOD token, and no other token of it is EOD
  - the split is by document and by sha256 of its text alone: the same on every machine, copies never on both sides
  - the folder appears under its name when it is whole, or not at all
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from moba_train.config.schema import ConfigError
from moba_train.data.info import FORMAT_VERSION, DatasetInfo, PrepareArguments, SplitInfo, already_prepared, write_info
from moba_train.data.sources import STANDARD_LIBRARY, Corpus, find_files, standard_library_files
from moba_train.data.split import text_hash, valid_threshold
from moba_train.data.tokenizer import Tokenizer, load_tokenizer, train_byte_bpe

__all__ = ["Progress", "prepare"]

Progress = Callable[[str, int, int], None]  # (stage, bytes done, bytes in all)
_BATCH_BYTES = 1 << 22  # of text encoded at a time
_BPE_BYTES = 1 << 25  # of train text that a tokenizer is trained on: more changes little


def prepare(
    arguments: PrepareArguments, *, overwrite: bool = False, progress: Progress = lambda *_: None
) -> DatasetInfo:
    """Prepare `arguments.output` and return its info; ConfigError for arguments that cannot work."""
    finished = already_prepared(arguments, overwrite)
    if finished is not None:
        return finished
    _check(arguments)
    corpus = _corpus(arguments)
    is_valid, total_bytes = _survey(corpus, arguments.valid_fraction, progress)
    tokenizer = (
        load_tokenizer(arguments.tokenizer, arguments.eod_token)
        if arguments.tokenizer is not None
        else train_byte_bpe(_train_sample(corpus, is_valid, total_bytes, progress), arguments.vocab_size)
    )
    output = Path(arguments.output)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        info = _write(partial, arguments, corpus, tokenizer, is_valid, total_bytes, progress)
        _put_in_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return info


def _check(arguments: PrepareArguments) -> None:
    if "" in arguments.inputs:
        raise ConfigError("--input", "", "is empty (an unset variable?); name files or folders")
    if not 0 < arguments.valid_fraction < 1:
        raise ConfigError("--valid-fraction", arguments.valid_fraction, "must lie between 0 and 1, both left out")
    if arguments.max_megabytes is not None and not 0 < arguments.max_megabytes < math.inf:
        raise ConfigError("--max-megabytes", arguments.max_megabytes, "must be above 0, and a number")
    if arguments.eod_token is not None and arguments.tokenizer is None:
        raise ConfigError("--eod-token", arguments.eod_token, "goes with --tokenizer; a trained one brings its own")


def _corpus(arguments: PrepareArguments) -> Corpus:
    files = find_files(arguments.inputs, arguments.suffixes) if arguments.inputs else standard_library_files()
    max_bytes = None if arguments.max_megabytes is None else int(arguments.max_megabytes * 1e6)
    return Corpus(files, text_key=arguments.text_key, max_bytes=max_bytes)


def _survey(corpus: Corpus, valid_fraction: float, progress: Progress) -> tuple[Callable[[str], bool], int]:
    """Walk the corpus once: which texts are for validation, and how many bytes there are.

    A text is for validation when its hash lies below the fraction; where none does, the lowest hash is taken.
    """
    lowest, highest, total_bytes = 1 << 64, -1, 0
    for text in corpus:
        value = text_hash(text)
        lowest, highest = min(lowest, value), max(highest, value)
        total_bytes += len(text.encode())
        progress("reading", total_bytes, 0)
    threshold = valid_threshold(valid_fraction, lowest)
    if highest < threshold:
        found = "no document" if highest < 0 else "no document is left for training"
        remedy = f"{found}; give at least two different ones, or a smaller --valid-fraction"
        raise ConfigError("--input", "all documents", remedy)
    return lambda text: text_hash(text) < threshold, total_bytes


def _train_sample(
    corpus: Corpus, is_valid: Callable[[str], bool], total_bytes: int, progress: Progress
) -> Iterator[str]:
    taken, limit = 0, min(_BPE_BYTES, total_bytes)
    for text in corpus:
        if not is_valid(text):
            taken += len(text.encode())
            progress("training the tokenizer", min(taken, limit), limit)
            yield text
            if taken >= limit:
                return


class _SplitWriter:
    """Writes one split's .bin and .idx and counts what goes in."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer) -> None:
        self.prefix = folder / name
        self.dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self.builder = IndexedDatasetBuilder(f"{self.prefix}.bin", dtype=self.dtype)
        self.sha256 = hashlib.sha256()
        self.documents = self.bytes = 0
        self.token_counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self.byte_counts = np.zeros(256, dtype=np.int64)

    def add(self, text: str, ids: np.ndarray) -> None:
        raw = np.frombuffer(text.encode(), dtype=np.uint8)
        tokens = ids.astype(self.dtype)
        self.builder.add_document(tokens, [len(tokens)])
        self.sha256.update(tokens.tobytes())
        self.documents += 1
        self.bytes += len(raw)
        self.token_counts += np.bincount(ids, minlength=len(self.token_counts))
        self.byte_counts += np.bincount(raw, minlength=256)

    def finish(self) -> SplitInfo:
        self.builder.finalize(f"{self.prefix}.idx")
        return SplitInfo(self.documents, int(self.token_counts.sum()), self.bytes, self.sha256.hexdigest())


def _write(
    folder: Path,
    arguments: PrepareArguments,
    corpus: Corpus,
    tokenizer: Tokenizer,
    is_valid: Callable[[str], bool],
    total_bytes: int,
    progress: Progress,
) -> DatasetInfo:
    train, valid = (_SplitWriter(folder, name, tokenizer) for name in ("train", "valid"))
    for texts in _batches(corpus):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            if tokenizer.eod in ids:
                remedy = f"name another end-of-document token than {tokenizer.eod_token!r} with --eod-token"
                raise ConfigError("--tokenizer", arguments.tokenizer, f"it makes that token of plain text; {remedy}")
            (valid if is_valid(text) else train).add(text, np.array([*ids, tokenizer.eod], dtype=np.int64))
        progress("encoding", train.bytes + valid.bytes, total_bytes)
    tokenizer.save(folder / "tokenizer")
    valid_bytes = max(valid.bytes, 1)
    info = DatasetInfo(
        format_version=FORMAT_VERSION,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod,
        eod_token=tokenizer.eod_token,
        pad_id=tokenizer.pad if tokenizer.pad >= 0 else None,
        tokenizer_sha256=tokenizer.sha256,
        train=train.finish(),
        valid=valid.finish(),
        bytes_per_token=valid.bytes / int(valid.token_counts.sum()),
        unigram_loss_per_byte=_unigram_loss(train.token_counts, valid.token_counts) / valid_bytes,
        byte_unigram_loss_per_byte=_unigram_loss(train.byte_counts, valid.byte_counts) / valid_bytes,
        sources=", ".join(arguments.inputs) or STANDARD_LIBRARY,
        skipped_files=corpus.skipped_files,
        skipped_texts=corpus.skipped_texts,
        arguments=arguments.stored(),
    )
    write_info(folder, info)
    return info


def _batches(corpus: Iterable[str]) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for text in corpus:
        texts.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _unigram_loss(train_counts: np.ndarray, valid_counts: np.ndarray) -> float:
    """Cross-entropy in nats, summed over the valid counts, of train's frequencies with add-one smoothing."""
    log_total = math.log(int(train_counts.sum()) + len(train_counts))
    return float((valid_counts * (log_total - np.log(train_counts + 1.0))).sum())


def _put_in_place(partial: Path, output: Path) -> None:
    """Rename `partial` to `output`; what lay there goes only once the new folder is whole."""
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)
