"""Refuse data that cannot be trained on, before any process group exists. Standard library and numpy only.

Every finding is a ConfigError with the key, the value and the remedy; a damaged file is named with its sizes.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from moba_train.config.schema import ConfigError, DataConfig
from moba_train.data.info import DatasetInfo, dataset_info
from moba_train.data.length_buckets import parsed_buckets, times_of_documents

__all__ = ["check_data", "check_split_files", "content_hash", "dataset_info", "weighted_folders"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = 34  # magic 9, version 8, dtype code 1, sequences 8, document bounds 8
_TOKEN_DTYPES: dict[int, np.dtype[Any]] = {
    4: np.dtype(np.int32),
    8: np.dtype(np.uint16),
}  # the codes that prepare.py writes


def weighted_folders(data: DataConfig) -> list[tuple[Path, float]]:
    """The prepared folders of data.path or data.blend, with weights that sum to 1; ConfigError unless one is given."""
    if data.path is not None and data.blend is not None:
        raise ConfigError("data.blend", dict(data.blend), f"data.path={data.path!r} is given too; drop one of the two")
    if data.path is not None:
        return [(Path(data.path).resolve(), 1.0)]
    if not data.blend:
        remedy = "name a prepared folder with data.path=DIR; python launch/prepare_data.py --output DIR makes one"
        raise ConfigError("data.path", data.path, remedy)
    for folder, weight in data.blend.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"data.blend.{folder}", weight, "a weight must be above 0; leave the folder out instead")
    total = sum(data.blend.values())
    return [(Path(folder).resolve(), weight / total) for folder, weight in data.blend.items()]


def content_hash(data: DataConfig) -> str:
    """What is trained on, wherever it lies: a hash of the tokens, tokenizer and weight of each folder in turn,
    and of how often documents of which length come."""
    parts = [(dataset_info(folder), weight) for folder, weight in weighted_folders(data)]
    told: list[Any] = [(info.train.sha256, info.tokenizer_sha256, weight) for info, weight in parts]
    if data.length_buckets is not None:
        told.append(parsed_buckets(data.length_buckets))
    return hashlib.sha256(repr(told).encode()).hexdigest()


def check_data(data: DataConfig, vocab_size: int, sequence_length: int | None = None) -> None:
    """ConfigError for the first thing that keeps `data` from being trained on by a model of `vocab_size` tokens.

    With `sequence_length`, each train split must fill at least one row.
    """
    key = "data.path" if data.path is not None else "data.blend"
    first: tuple[Path, DatasetInfo] | None = None
    if not 0 <= data.seed < 2**31:
        raise ConfigError("data.seed", data.seed, f"must lie between 0 and {2**31 - 1}")
    parsed_buckets(data.length_buckets)
    for folder, _ in weighted_folders(data):
        info = dataset_info(folder, key)
        if info.vocab_size > vocab_size:
            remedy = f"the tokenizer of {folder} has {info.vocab_size} tokens; set model.vocab_size to at least that"
            raise ConfigError("model.vocab_size", vocab_size, remedy)
        for split, tokens in (("train", info.train.tokens), ("valid", info.valid.tokens)):
            lengths = check_split_files(folder, split, tokens, key)
            if split == "train" and data.length_buckets is not None and sequence_length is not None:
                left = int((lengths * times_of_documents(lengths, data.length_buckets)).sum())
                if left < sequence_length + 1:
                    remedy = f"a pass over {folder} has only {left} tokens, less than a row of {sequence_length}"
                    raise ConfigError("data.length_buckets", data.length_buckets, remedy)
        if sequence_length is not None and info.train.tokens < sequence_length + 1:
            remedy = f"{folder} has only {info.train.tokens} train tokens: use shorter rows, or prepare more text"
            raise ConfigError("train.sequence_length", sequence_length, remedy)
        _check_cache(data, folder)
        first = first or (folder, info)
        if (info.tokenizer_sha256, info.eod_id) != (first[1].tokenizer_sha256, first[1].eod_id):
            remedy = f"its tokenizer is not that of {first[0]}; prepare it with --tokenizer {first[0] / 'tokenizer'}"
            raise ConfigError(key, str(folder), remedy)


def check_split_files(folder: Path, split: str, tokens: int, key: str = "data.path") -> np.ndarray:
    """Tokens of every document; ConfigError unless `split`.idx and .bin are whole and hold `tokens` tokens.

    Reads the index, not the tokens.
    """
    index, data = folder / f"{split}.idx", folder / f"{split}.bin"

    def damaged(file: Path, what: str) -> ConfigError:
        remedy = f"prepare the folder again (python launch/prepare_data.py --output {folder} --overwrite)"
        return ConfigError(key, str(folder), f"{file.name} {what}; {remedy}")

    for file in (index, data):
        if not file.is_file():
            raise damaged(file, "is missing")
    with index.open("rb") as stream:
        header = stream.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES:
            raise damaged(index, f"is truncated: {len(header)} bytes, less than its header of {_HEADER_BYTES}")
        version, sequences, bounds = (int.from_bytes(header[at : at + 8], "little") for at in (9, 18, 26))
        dtype = _TOKEN_DTYPES.get(header[17])
        if not header.startswith(_MAGIC) or version != 1 or dtype is None:
            raise damaged(index, "does not begin as an index does: corrupt, or another kind of file")
        actual, expected = index.stat().st_size, _HEADER_BYTES + sequences * (4 + 8) + bounds * 8
        if actual != expected:
            word = "truncated" if actual < expected else "corrupt"
            raise damaged(index, f"is {word}: {actual} bytes, expected {expected}")
        lengths = np.fromfile(stream, dtype=np.int32, count=sequences).astype(np.int64)
        offsets = np.fromfile(stream, dtype=np.int64, count=sequences)
    if (lengths < 1).any() or int(lengths.sum()) != tokens:
        raise damaged(index, f"counts {int(lengths.sum())} tokens where dataset.json says {tokens}")
    if (offsets != (np.cumsum(lengths) - lengths) * dtype.itemsize).any():
        raise damaged(index, "is corrupt: its documents do not follow one another")
    actual, expected = data.stat().st_size, tokens * dtype.itemsize
    if actual != expected:
        word = "truncated" if actual < expected else "too long"
        raise damaged(data, f"is {word}: {actual} bytes, but its index says {expected}")
    return lengths


def _check_cache(data: DataConfig, folder: Path) -> None:
    """The sample indices need a place: refuse one that cannot be written now rather than after the launch."""
    cache = Path(data.cache_dir) if data.cache_dir is not None else folder / "cache"
    existing = next(parent for parent in (cache, *cache.resolve().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError("data.cache_dir", data.cache_dir, f"cannot write {cache}; name a folder that all nodes share")
