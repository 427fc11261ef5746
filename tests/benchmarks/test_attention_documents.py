"""The work counted in the benchmark of full attention."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from moba_train.attention import SequenceInfo, reference
from moba_train.context_parallel.layout import zigzag


def test_work_is_what_the_queries_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    documents = importlib.import_module("attention_documents")
    for bounds in ([0, 5, 5, 30, 64], [0, 64]):
        for rows in (None, zigzag(64, 4).positions(0)):
            seq = SequenceInfo(bounds, rows)
            assert documents.pairs_of(seq) == int(reference.full_mask(seq).sum())
