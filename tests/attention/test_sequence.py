"""SequenceInfo: blocks, runs, checks; and that nothing in it can go stale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_train.attention import SequenceInfo
from moba_train.attention.reference import full_mask


def test_blocks_by_hand() -> None:
    """Documents of 5, 0, 3 and 2 tokens in blocks of 2."""
    seq = SequenceInfo([0, 5, 5, 8, 10])
    blocks = seq.blocks(2)
    assert blocks.num_blocks == 6
    assert blocks.max_block == 2
    assert blocks.start_N.tolist() == [0, 2, 4, 5, 7, 8]
    assert blocks.end_N.tolist() == [2, 4, 5, 7, 8, 10]
    assert blocks.document_N.tolist() == [0, 0, 0, 2, 2, 3]
    assert blocks.first_block.tolist() == [0, 3, 3, 5, 6]
    assert blocks.own_T.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 5, 5]
    assert blocks.first_T.tolist() == [0] * 5 + [3] * 3 + [5] * 2
    assert blocks.limit_T.tolist() == list(range(1, 11))
    assert torch.equal(blocks.held_start_N, blocks.start_N)
    assert torch.equal(blocks.query_start_N, blocks.start_N)


def test_blocks_of_a_shard_by_hand() -> None:
    """Queries at rows 1, 4 and 7; keys 0, 3, 4 and 9 held."""
    blocks = SequenceInfo([0, 5, 10], [1, 4, 7], [0, 3, 4, 9]).blocks(2)
    assert blocks.start_N.tolist() == [0, 2, 4, 5, 7, 9]
    assert blocks.own_T.tolist() == [0, 2, 4]
    assert blocks.held_start_N.tolist() == [0, 1, 2, 3, 3, 3]
    assert blocks.held_end_N.tolist() == [1, 2, 3, 3, 3, 4]
    assert blocks.limit_T.tolist() == [1, 3, 3]
    assert blocks.query_start_N.tolist() == [0, 1, 1, 2, 2, 3]
    assert blocks.query_end_N.tolist() == [1, 1, 2, 2, 3, 3]


def test_runs_by_hand() -> None:
    assert SequenceInfo([0, 3, 3, 7]).runs == [(0, 3, 0, 0, 3), (3, 7, 3, 3, 7)]
    zigzag = SequenceInfo([0, 8], [0, 1, 6, 7])
    assert zigzag.runs == [(0, 2, 0, 0, 2), (2, 4, 0, 6, 8)]
    # The other rank's keys: the first run sees none of them, the last all four.
    assert SequenceInfo([0, 8], [0, 1, 6, 7], [2, 3, 4, 5]).runs == [(0, 2, 0, 0, 0), (2, 4, 0, 4, 4)]
    assert SequenceInfo([0]).runs == []


@st.composite
def sequences(draw: st.DrawFn) -> SequenceInfo:
    lengths = draw(st.lists(st.integers(0, 9), max_size=5))
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    rows = st.none() | st.lists(st.booleans(), min_size=bounds[-1], max_size=bounds[-1]).map(
        lambda keep: [row for row, kept in enumerate(keep) if kept]
    )
    return SequenceInfo(bounds, draw(rows), draw(rows))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(sequences())
def test_runs_cover_the_causal_mask_exactly(seq: SequenceInfo) -> None:
    covered = torch.zeros(seq.num_queries, seq.num_held, dtype=torch.int64)
    for run in seq.runs:
        covered[run.q_start : run.q_end, run.k_start : run.k_diagonal] += 1
        square = covered[run.q_start : run.q_end, run.k_diagonal : run.k_end]
        assert square.shape[1] in (0, square.shape[0])
        square += torch.ones_like(square).tril()
    assert torch.equal(covered, full_mask(seq).long())


@settings(deadline=None, max_examples=60, derandomize=True)
@given(sequences(), st.integers(1, 12))
def test_blocks_partition_every_document(seq: SequenceInfo, block_size: int) -> None:
    blocks = seq.blocks(block_size)
    rows = [range(a, b) for a, b in zip(blocks.start_N.tolist(), blocks.end_N.tolist(), strict=True)]
    assert [row for block in rows for row in block] == list(range(seq.num_keys))
    assert all(0 < len(block) <= block_size for block in rows)
    bounds = seq.cu_seqlens.tolist()
    for block, document in zip(rows, blocks.document_N.tolist(), strict=True):
        assert bounds[document] <= block[0] <= block[-1] < bounds[document + 1]
        assert (block[0] - bounds[document]) % block_size == 0
        assert len(block) == block_size or block[-1] + 1 == bounds[document + 1]
    held = list(range(seq.num_keys)) if seq.k_positions is None else seq.k_positions.tolist()
    for block, start, end in zip(rows, blocks.held_start_N.tolist(), blocks.held_end_N.tolist(), strict=True):
        assert held[start:end] == [row for row in held if row in block]
    positions = list(range(seq.num_keys)) if seq.q_positions is None else seq.q_positions.tolist()
    for position, own, limit in zip(positions, blocks.own_T.tolist(), blocks.limit_T.tolist(), strict=True):
        assert position in rows[own]
        assert limit == sum(row <= position for row in held)


def test_a_reused_buffer_changes_nothing() -> None:
    """Metadata belongs to the object: no cache is keyed by the identity of the caller's tensor."""
    bounds, positions = torch.tensor([0, 4, 8], dtype=torch.int32), torch.tensor([1, 5])
    first = SequenceInfo(bounds, positions)
    bounds.copy_(torch.tensor([0, 2, 8]))
    positions.add_(1)
    second = SequenceInfo(bounds, positions)
    assert first.blocks(4).start_N.tolist() == [0, 4]
    assert first.q_positions.tolist() == [1, 5]
    assert second.blocks(4).start_N.tolist() == [0, 2, 6]
    assert first.blocks(4) is first.blocks(4)
    assert first.on("cpu") is first.on("cpu")


def test_tensors_for_a_device() -> None:
    on = SequenceInfo([0, 3], k_positions=[2]).on("cpu")
    assert on.cu_seqlens.dtype == torch.int32
    assert on.q_positions.tolist() == [0, 1, 2]
    assert on.k_positions.tolist() == [2]
    assert SequenceInfo([0, 3]).on("cpu").k_positions is None
    moved = SequenceInfo([0, 3]).blocks(2).on("meta")
    assert moved.own_T.device.type == "meta"
    assert moved.num_blocks == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "start at 0"),
        (([1, 4],), "start at 0"),
        (([0, 5, 3],), "never decrease"),
        (([0, 2**31],), "32 bits"),
        (([0.0, 4.0],), "whole numbers"),
        (([[0, 4]],), "one dimension"),
        (([0, 4], [0, 4]), "0 .. 3"),
        (([0, 4], [-1, 2]), "0 .. 3"),
        (([0, 4], [2, 2]), "strictly increasing"),
        (([0, 4], None, [3, 1]), "strictly increasing"),
        (([0, 4], None, [0, 9]), "k_positions"),
        ((torch.empty(2, dtype=torch.int32, device="meta"),), "on the host"),
    ],
)
def test_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceInfo(*arguments)
