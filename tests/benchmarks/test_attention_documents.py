"""The batches of the benchmark of full attention, and the work counted in them."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pytest

from moba_train.attention import SequenceInfo, reference


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("attention_documents")


def test_work_is_what_the_queries_see(documents) -> None:
    packed = SequenceInfo([0, 5, 5, 30, 64])
    for seq in (packed, SequenceInfo([0, 64]), documents._rank(packed), documents._rank(SequenceInfo([0, 64]))):
        assert documents._pairs(seq) == int(reference.full_mask(seq).sum())


def test_packed_documents_fill_the_rows(documents) -> None:
    bounds = documents._packed(65536)
    assert (bounds[0], bounds[-1]) == (0, 65536)
    assert len(bounds) > 5
    assert all(end > start for start, end in itertools.pairwise(bounds))


def test_the_rank_has_the_first_and_the_last_chunk(documents) -> None:
    seq = documents._rank(SequenceInfo([0, 64]))
    assert seq.q_positions.tolist() == [*range(8), *range(56, 64)]
