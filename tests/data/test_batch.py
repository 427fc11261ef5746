"""A padded row is the row, and behind it filler that nothing sees and that counts for nothing."""

from __future__ import annotations

import pytest
import torch

from moba_train.context_parallel.layout import contiguous, zigzag
from moba_train.data.batch import Batch
from moba_train.data.packing import pack_row

PARTS = ("tokens", "labels", "loss_mask", "positions", "cu_seqlens")


def row(length: int) -> Batch:
    return pack_row(torch.arange(length + 1) % 5, 0, "packed")


@pytest.mark.parametrize("length, padded", [(7, 8), (7, 20), (1, 4)])
def test_filler_is_a_document_of_its_own_without_loss(length: int, padded: int) -> None:
    before, after = row(length), row(length).pad(padded)
    for name in PARTS:
        old, new = getattr(before, name), getattr(after, name)
        assert new.dtype == old.dtype
        assert torch.equal(new[: len(old)], old), name
        assert len(new) == (len(old) + 1 if name == "cu_seqlens" else padded)
    assert int(after.cu_seqlens[-1]) == padded
    assert not after.loss_mask[length:].any()
    assert after.positions[length:].tolist() == list(range(padded - length))
    # Of any vocabulary.
    assert not after.tokens[length:].any()
    assert not after.labels[length:].any()
    assert after.q_positions is None


def test_a_row_that_fits_is_left_alone() -> None:
    batch = row(8)
    assert batch.pad(8) is batch


def test_a_shard_may_be_filler_alone() -> None:
    batch = row(5).pad(12)
    shard = batch.shard(contiguous(12, 3), 2)
    assert shard.q_positions is not None
    assert shard.q_positions.tolist() == [8, 9, 10, 11]
    assert shard.positions.tolist() == [3, 4, 5, 6]
    assert not shard.loss_mask.any()
    assert torch.equal(shard.cu_seqlens, batch.cu_seqlens)


def test_neither_a_shard_nor_to_less() -> None:
    with pytest.raises(ValueError, match="a row of 8 tokens cannot be padded to 6"):
        row(8).pad(6)
    with pytest.raises(ValueError, match="a shard already"):
        row(8).shard(zigzag(8, 2), 0).pad(8)
