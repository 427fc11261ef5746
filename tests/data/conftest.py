"""Tiny prepared folders: a few JSONL documents, a byte-level BPE of a few hundred tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from moba_train.data.info import DatasetInfo, PrepareArguments
from moba_train.data.prepare import prepare

Prepared = tuple[Path, DatasetInfo]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def sentences(count: int, word: str = "line") -> list[str]:
    """Documents of different content and length."""
    return [" ".join(f"{word} {i} of {j};" for j in range(1 + i % 7)) for i in range(count)]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Prepared]:
    def make_folder(texts: Sequence[str], **options: Any) -> Prepared:
        folder = tmp_path_factory.mktemp("prepared")
        source = write_jsonl(folder / "texts.jsonl", texts)
        output = folder / "data"
        options = {"vocab_size": 300, "valid_fraction": 0.2, **options}
        return output, prepare(PrepareArguments(str(output), inputs=(str(source),), **options))

    return make_folder


@pytest.fixture(scope="session")
def corpus(make: Callable[..., Prepared]) -> Prepared:
    """One folder that tests read and never change."""
    return make(sentences(120))
