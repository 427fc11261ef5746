"""Every row that can be cut from any text: bounds, positions, labels and loss, in both modes."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from moba_train.context_parallel.layout import contiguous, zigzag
from moba_train.data.packing import pack_documents, pack_row

EOD = 0
# Many end tokens: empty documents, documents of one token, ends at both edges of the row.
texts = st.lists(st.integers(0, 4), min_size=2, max_size=33).map(lambda ids: torch.tensor(ids, dtype=torch.int64))


@given(texts, st.sampled_from(["packed", "concatenated"]), st.data())
@settings(max_examples=300, deadline=None)
def test_row_invariants(text: torch.Tensor, mode: str, data: st.DataObject) -> None:
    real = data.draw(st.integers(0, len(text)))
    batch = pack_row(text, EOD, mode, real)
    length = len(text) - 1
    assert batch.tokens.tolist() == text[:-1].tolist()
    assert batch.labels.tolist() == text[1:].tolist()
    bounds = batch.cu_seqlens.tolist()
    assert (bounds[0], bounds[-1]) == (0, length)
    assert all(a < b for a, b in pairwise(bounds))

    expected_bounds, expected_loss, positions = {0, length}, [], []
    if 0 < real < length:
        expected_bounds.add(real)
    start = 0
    for row in range(length):
        if row == real:
            start = row
        positions.append(row - start)
        crossing = mode == "packed" and text[row] == EOD
        expected_loss.append(float(row + 1 < real and not crossing))
        if crossing and row < real:
            start = row + 1
            expected_bounds.add(start)
    assert bounds == sorted(expected_bounds)
    assert batch.positions.tolist() == positions
    assert batch.loss_mask.tolist() == expected_loss
    assert [t.dtype for t in (batch.tokens, batch.labels, batch.loss_mask, batch.positions, batch.cu_seqlens)] == [
        torch.int64,
        torch.int64,
        torch.float32,
        torch.int64,
        torch.int32,
    ]


def test_worked_example() -> None:
    batch = pack_row(torch.tensor([7, 8, EOD, 9, EOD, 5, 6]), EOD, "packed")
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0]
    assert batch.labels.tolist() == [8, EOD, 9, EOD, 5, 6]
    assert batch.loss_mask.tolist() == [1, 1, 0, 1, 0, 1]


def test_filler_is_known_by_place_not_by_id() -> None:
    batch = pack_row(torch.tensor([7, EOD, 8, EOD, EOD, EOD, EOD]), EOD, "packed", num_real=4)
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 6]
    assert batch.loss_mask.tolist() == [1, 0, 1, 0, 0, 0]


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([zigzag, contiguous]), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_shards_of_all_ranks_are_the_whole_row(ranks: int, size: int, rule, random) -> None:
    length = 2 * ranks * size
    batch = pack_row(torch.tensor([random.randint(0, 4) for _ in range(length + 1)]), EOD, "packed")
    layout = rule(length, ranks)
    seen = []
    for rank in range(ranks):
        shard = batch.shard(layout, rank)
        rows = shard.q_positions
        assert rows.tolist() == layout.positions(rank)
        for name in ("tokens", "labels", "loss_mask", "positions"):
            assert torch.equal(getattr(shard, name), getattr(batch, name)[rows])
        assert torch.equal(shard.cu_seqlens, batch.cu_seqlens)
        seen += rows.tolist()
    assert sorted(seen) == list(range(length))


def test_shard_refuses_another_length_and_a_shard() -> None:
    batch = pack_row(torch.arange(9), EOD, "packed")
    with pytest.raises(ValueError, match="the layout is for 4 rows, the batch has 8"):
        batch.shard(zigzag(4, 2), 0)
    with pytest.raises(ValueError, match="a shard already"):
        batch.shard(zigzag(8, 2), 0).shard(zigzag(4, 2), 0)


def test_to_leaves_bounds_on_the_host() -> None:
    moved = pack_row(torch.arange(9), EOD, "packed").shard(zigzag(8, 2), 1).to("meta")
    assert {getattr(moved, n).device.type for n in ("tokens", "labels", "loss_mask", "positions")} == {"meta"}
    assert {moved.cu_seqlens.device.type, moved.q_positions.device.type} == {"cpu"}


def test_documents_are_kept_apart_and_end_with_a_label() -> None:
    documents = [
        (torch.tensor([7, 8, 9]), torch.tensor([0.0, 0.5, 0.25])),
        (torch.tensor([7, 6]), torch.tensor([1.0, 1.0])),
    ]
    batch = pack_documents(documents, 6)
    assert batch.tokens.tolist() == [7, 8, 7, 0, 0, 0]
    assert batch.labels.tolist() == [8, 9, 6, 0, 0, 0]
    assert batch.loss_mask.tolist() == [0.5, 0.25, 1.0, 0.0, 0.0, 0.0]
    assert batch.positions.tolist() == [0, 1, 0, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 6]
    assert batch.cu_seqlens.dtype == torch.int32
    full = pack_documents(documents, 3)
    assert full.cu_seqlens.tolist() == [0, 2, 3]
    empty = pack_documents([], 4)
    assert (empty.cu_seqlens.tolist(), empty.loss_mask.tolist()) == ([0, 4], [0.0] * 4)


@pytest.mark.parametrize("sizes, length", [([4, 4], 5), ([1], 5), ([0], 5)])
def test_documents_that_do_not_fit_are_refused(sizes: list[int], length: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        pack_documents([(torch.zeros(n, dtype=torch.int64), torch.zeros(n)) for n in sizes], length)
