"""What a prepared folder says about itself (dataset.json), and what it is asked to be. Standard library only.

A prepared folder holds train.bin/.idx, valid.bin/.idx, tokenizer/ and dataset.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moba_train.config.schema import ConfigError

__all__ = [
    "DATASET_JSON",
    "FORMAT_VERSION",
    "DatasetInfo",
    "PrepareArguments",
    "SplitInfo",
    "already_prepared",
    "dataset_info",
    "write_info",
]

DATASET_JSON = "dataset.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class SplitInfo:
    """One of train and valid."""

    documents: int
    tokens: int  # the end-of-document token of each document included
    bytes: int  # of text, UTF-8
    sha256: str  # of the .bin file


@dataclass(frozen=True)
class DatasetInfo:
    """dataset.json. Losses are in nats per byte of the valid split's text; see data/README.md for their formulas."""

    format_version: int
    vocab_size: int
    eod_id: int
    eod_token: str
    pad_id: int | None  # None: the tokenizer has none of its own
    tokenizer_sha256: str
    train: SplitInfo
    valid: SplitInfo
    bytes_per_token: float  # of the valid split: loss per byte = loss per token / this
    unigram_loss_per_byte: float
    byte_unigram_loss_per_byte: float
    sources: str
    skipped_files: int
    skipped_texts: int
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class PrepareArguments:
    """What to prepare. Stored in dataset.json: the same arguments again are the same folder."""

    output: str
    inputs: tuple[str, ...] = ()  # empty: the standard library's sources
    suffixes: tuple[str, ...] = ()
    text_key: str = "text"
    tokenizer: str | None = None  # None: train a byte-level BPE on the train split
    eod_token: str | None = None
    vocab_size: int = 4096
    valid_fraction: float = 0.05
    max_megabytes: float | None = None

    def stored(self) -> dict[str, Any]:
        """The arguments as dataset.json keeps them: all but where the folder lies, in JSON's types."""
        values = dataclasses.asdict(self)
        del values["output"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def dataset_info(path: str | Path, key: str = "data.path") -> DatasetInfo:
    """Read the dataset.json of a prepared folder; ConfigError (about `key`) where there is none or it is damaged."""
    folder = Path(path)
    remedy = f"prepare it with: python launch/prepare_data.py --output {folder}"
    if not folder.is_dir():
        raise ConfigError(key, str(path), f"no such folder; {remedy}")
    file = folder / DATASET_JSON
    if not file.is_file():
        raise ConfigError(key, str(path), f"not a prepared folder: it has no {DATASET_JSON}; {remedy}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise ConfigError(key, str(path), f"its format is {version}, not {FORMAT_VERSION}; {remedy} --overwrite")
        train, valid = (SplitInfo(**values.pop(name)) for name in ("train", "valid"))
        info = DatasetInfo(**values, train=train, valid=valid)
        _check_numbers(info)
        return info
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(key, str(path), f"{file.name} is damaged ({error}); {remedy} --overwrite") from error


def _check_numbers(info: DatasetInfo) -> None:
    """ValueError for what no prepared text has."""
    ids = [id for id in (info.eod_id, info.pad_id) if id is not None]
    if not isinstance(info.vocab_size, int) or not all(isinstance(id, int) and 0 <= id < info.vocab_size for id in ids):
        raise ValueError(f"token ids {ids} of a vocabulary of {info.vocab_size!r}")
    losses = ("bytes_per_token", "unigram_loss_per_byte", "byte_unigram_loss_per_byte")
    for name in losses:
        value = getattr(info, name)
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf or (name == losses[0] and not value):
            raise ValueError(f"{name} is {value!r}")


def write_info(folder: Path, info: DatasetInfo) -> None:
    """Write `info` as the folder's dataset.json."""
    text = json.dumps(dataclasses.asdict(info), indent=2, ensure_ascii=False)
    (folder / DATASET_JSON).write_text(text + "\n", encoding="utf-8")


def already_prepared(arguments: PrepareArguments, overwrite: bool = False) -> DatasetInfo | None:
    """The finished folder's info where the same arguments made it, None where there is work to do.

    Raises ConfigError where something else lies there, unless it is a prepared folder and `overwrite` is given.
    """
    output = Path(arguments.output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / DATASET_JSON).is_file():
        raise ConfigError("--output", arguments.output, "holds something else than prepared data; name another folder")
    if overwrite:
        return None
    info = dataset_info(output, key="--output")
    new = arguments.stored()
    old = {key: info.arguments.get(key) for key in new}
    changed = "; ".join(f"{key} was {old[key]!r}, is {new[key]!r}" for key in new if old[key] != new[key])
    if changed:
        remedy = f"prepared with other arguments ({changed}); name another folder, or replace this one with --overwrite"
        raise ConfigError("--output", arguments.output, remedy)
    return info
