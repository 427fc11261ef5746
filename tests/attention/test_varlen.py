"""Calls of a varlen kernel: which rows meet which keys, and the lengths that they state."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from moba_train.attention import SequenceInfo
from moba_train.attention.reference import full_mask, moba_mask
from moba_train.attention.varlen import VarlenCall, dense_calls, own_calls, pack, unpack
from tests.helpers.cases import CASES, Case

CPU = torch.device("cpu")


def _mask(calls: list[VarlenCall], seq: SequenceInfo) -> torch.Tensor:
    """[T, S]: how often the calls let a query see a key."""
    seen = torch.zeros(seq.num_queries, seq.num_held, dtype=torch.int64)
    for call in calls:
        rows = call.rows if call.rows.numel() else torch.arange(call.first, call.last)
        for (first, last), (key, key_end) in zip(pairwise(call.queries), pairwise(call.keys), strict=True):
            square = torch.ones(last - first, key_end - key, dtype=torch.int64)
            columns = torch.arange(int(key), int(key_end))
            diagonal = square.shape[1] - square.shape[0]
            seen[rows[first:last, None], columns] += square.tril(diagonal) if call.causal else square
    return seen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_calls_are_the_mask_and_state_their_longest_sequences(case: Case) -> None:
    seq = case.sequence()
    own_T11 = seq.blocks(case.block_size).own_T[:, None, None]
    own = moba_mask(seq, own_T11, case.block_size)[:, 0]
    for calls, mask in ((dense_calls(seq, CPU), full_mask(seq)), (own_calls(seq, case.block_size, CPU), own)):
        assert torch.equal(_mask(calls, seq), mask.long())
        for call in calls:
            assert call.queries[0] == call.keys[0] == 0
            assert call.keys[-1] == seq.num_held
            assert call.queries.diff().min() >= 0
            assert call.queries.diff().max() == call.max_queries
            assert 0 < call.keys.diff().max() <= call.max_keys
        for call, again in zip(calls, unpack(*pack(calls)), strict=True):
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(call, again, strict=True))


def test_a_decoded_token_cuts_a_long_cache_in_few_sequences() -> None:
    """Its own block has one key; a million others are seen by nobody."""
    (call,) = own_calls(SequenceInfo([0, 1_000_001], [1_000_000]), 500, CPU)
    assert len(call.keys) <= 5
    assert call.max_keys == call.keys.diff().max() < 1_000_000
