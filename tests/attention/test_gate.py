"""Routing, apart from attention: exact picks, ties, shards, precision."""

from __future__ import annotations

import pytest
import torch

from moba_train.attention import (
    SequenceInfo,
    block_means,
    block_sums,
    gate,
    means_from_sums,
    select_blocks,
    select_from_means,
)
from tests.helpers.cases import CASES, Case, zigzag_positions
from tests.helpers.tolerance import assert_same_routing


@pytest.mark.parametrize("case", CASES, ids=str)
def test_routing_equals_reference(case: Case, gate_backend) -> None:
    seq, sizes = case.sequence(), case.routing
    for dtype in gate_backend.dtypes:
        q, k = case.inputs(dtype, gate_backend.device)[:2]
        picks = select_blocks(q, k, seq, **sizes, backend=gate_backend.name)
        expected = select_blocks(q, k, seq, **sizes, backend="reference")
        assert not picks.requires_grad
        if gate_backend.name == "portable" or case.quantised:
            assert torch.equal(picks, expected)
        else:
            assert_same_routing(picks, expected, q, block_means(k, seq, case.block_size), case.share_picks_in_group)


def test_order_of_picks() -> None:
    """Own block, then falling score, then -1; only earlier blocks of the same document compete."""
    k = torch.tensor([5.0, 5.0, 1.0, 1.0, 3.0, 3.0, 2.0, 2.0, 9.0, 9.0])[:, None, None]
    q = torch.ones(10, 1, 1)
    picks = select_blocks(q, k, SequenceInfo([0, 2, 10]), block_size=2, top_k=3)[:, 0].tolist()
    assert picks[1] == [0, -1, -1]
    assert picks[3] == [1, -1, -1]
    assert picks[4] == [2, 1, -1]
    assert picks[7] == [3, 2, 1]
    assert picks[9] == [4, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_go_to_the_lower_block(dtype: torch.dtype, gate_backend) -> None:
    if dtype not in gate_backend.dtypes:
        pytest.skip(f"{gate_backend} is not tested in {dtype}")
    # Scores 0, -0, 0, 1, 1, -1 for the six candidates: a zero's sign must not order anything.
    k = torch.tensor([0.0, -0.0, 0.0, 1.0, 1.0, -1.0, 7.0], dtype=dtype, device=gate_backend.device)[:, None, None]
    q = torch.ones(7, 1, 1, dtype=dtype, device=gate_backend.device)
    picks = select_blocks(q, k, SequenceInfo([0, 7]), block_size=1, top_k=7, backend=gate_backend.name)
    assert picks[6, 0].tolist() == [6, 3, 4, 0, 1, 2, 5]


def test_heads_of_a_group_choose_freely() -> None:
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])[:, None]
    q = torch.eye(2).expand(3, 2, 2)
    picks = select_blocks(q, k, SequenceInfo([0, 3]), block_size=1, top_k=2)
    assert picks[2].tolist() == [[2, 0], [2, 1]]


def test_previous_block_comes_second_whatever_its_score() -> None:
    k = torch.tensor([5.0, 5.0, 9.0, 9.0, 3.0, 3.0, -2.0, -2.0, 1.0, 1.0])[:, None, None]
    q, seq = torch.ones(10, 1, 1), SequenceInfo([0, 2, 10])
    picks = select_blocks(q, k, seq, block_size=2, top_k=3, force_previous_block=True)[:, 0].tolist()
    assert picks[1] == [0, -1, -1]
    assert picks[3] == [1, -1, -1]  # the block before belongs to another document
    assert picks[4] == [2, 1, -1]
    assert picks[7] == [3, 2, 1]
    assert picks[9] == [4, 3, 1]
    two = select_blocks(q, k, seq, block_size=2, top_k=2, force_previous_block=True)[:, 0].tolist()
    assert [two[row] for row in (1, 3, 5, 9)] == [[0, -1], [1, -1], [2, 1], [4, 3]]


def test_first_block_comes_second_whatever_its_score() -> None:
    k = torch.tensor([5.0, 5.0, -9.0, -9.0, 3.0, 3.0, -2.0, -2.0, 1.0, 1.0])[:, None, None]
    q, seq = torch.ones(10, 1, 1), SequenceInfo([0, 2, 10])
    picks = select_blocks(q, k, seq, block_size=2, top_k=3, force_first_block=True)[:, 0].tolist()
    assert picks[1] == [0, -1, -1]
    assert picks[3] == [1, -1, -1]  # its own block is the first of its document
    assert picks[4] == [2, 1, -1]
    assert picks[7] == [3, 1, 2]
    assert picks[9] == [4, 1, 2]
    both = {"force_first_block": True, "force_previous_block": True}
    picks = select_blocks(q, k, seq, block_size=2, top_k=4, **both)[:, 0].tolist()
    assert [picks[row] for row in (3, 4, 7, 9)] == [[1, -1, -1, -1], [2, 1, -1, -1], [3, 1, 2, -1], [4, 1, 3, 2]]


def test_a_group_that_shares_picks_by_its_mean_query() -> None:
    k = torch.tensor([[3.0, 0.0], [0.0, 2.0], [2.0, 2.0], [0.0, 0.0]])[:, None]
    q = torch.eye(2).expand(4, 2, 2)
    free = select_blocks(q, k, SequenceInfo([0, 4]), block_size=1, top_k=2)
    assert free[3].tolist() == [[3, 0], [3, 1]]
    shared = select_blocks(q, k, SequenceInfo([0, 4]), block_size=1, top_k=2, share_picks_in_group=True)
    assert shared[3].tolist() == [[3, 2], [3, 2]]  # second best for one head, tied for the other, best for both


def test_shared_picks_are_those_of_one_head_a_group() -> None:
    case = Case("", (0, 50, 71), heads=6, key_heads=2, quantised=True)
    inputs = case.inputs()
    shared = select_blocks(*inputs[:2], case.sequence(), **case.routing | {"share_picks_in_group": True})
    alone = select_blocks(
        inputs.q_THD.unflatten(1, (2, 3)).sum(2), inputs.k_SGD, case.sequence(), block_size=8, top_k=3
    )
    assert torch.equal(shared, alone.repeat_interleave(3, 1))


def test_means_are_not_rounded_to_the_dtype_of_keys() -> None:
    """Mean 1.00195 beats 1.0 only while it is not rounded to bf16, whose next value is 1.0078."""
    k = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0078125, 0.0], dtype=torch.bfloat16)[:, None, None]
    q = torch.ones(9, 1, 1, dtype=torch.bfloat16)
    assert select_blocks(q, k, SequenceInfo([0, 9]), block_size=4, top_k=2)[8, 0].tolist() == [2, 1]
    assert block_means(k, SequenceInfo([0, 9]), 4).dtype == torch.float32


def test_autocast_does_not_touch_the_scores() -> None:
    seq, generator = SequenceInfo([0, 256]), torch.Generator().manual_seed(0)
    q, k = torch.randn(256, 4, 16, generator=generator), torch.randn(256, 2, 16, generator=generator)
    expected = select_blocks(q, k, seq, block_size=8, top_k=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(select_blocks(q, k, seq, block_size=8, top_k=4), expected)


def test_means_of_short_blocks() -> None:
    k = torch.tensor([1.0, 3.0, 5.0, 8.0, 10.0])[:, None, None]
    means = block_means(k, SequenceInfo([0, 3, 3, 5]), 2)
    assert means.flatten().tolist() == [2.0, 5.0, 9.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_partial_sums_give_bitwise_the_same_means(dtype: torch.dtype) -> None:
    """Holders of any rows, added in any order: the way a context-parallel ring builds the means."""
    rows = 240
    k = torch.randn(rows, 2, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    bounds, block_size = [0, 100, 101, rows], 16
    whole = block_means(k, SequenceInfo(bounds), block_size)
    shards = [zigzag_positions(rows, rank, 4) for rank in range(4)] + [()]
    for order in (shards, shards[::-1]):
        sums = sum(block_sums(k[list(rows)], SequenceInfo(bounds, k_positions=rows), block_size) for rows in order)
        assert torch.equal(means_from_sums(sums, SequenceInfo(bounds), block_size, dtype), whole)


@pytest.mark.parametrize(
    "positions",
    [zigzag_positions(192, 0, 4), zigzag_positions(192, 3, 4), tuple(range(100, 192)), (191,), tuple(range(0, 192, 7))],
    ids=["zigzag-0", "zigzag-3", "prefill", "decode", "strided"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shards_pick_what_the_whole_picks(positions: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(192, heads, 32, generator=generator).to(dtype) for heads in (6, 2))
    bounds, sizes = [0, 150, 192], {"block_size": 8, "top_k": 4}
    whole = select_blocks(q, k, SequenceInfo(bounds), **sizes)
    shard = SequenceInfo(bounds, positions)
    rows = list(positions)
    assert torch.equal(select_blocks(q[rows], k, shard, **sizes), whole[rows])
    means = block_means(k, SequenceInfo(bounds), 8)
    assert torch.equal(select_from_means(q[rows], means, shard, **sizes), whole[rows])


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(130, 4, 8, generator=generator), torch.randn(130, 2, 8, generator=generator)
    seq = SequenceInfo([0, 90, 130])
    expected = select_blocks(q, k, seq, block_size=4, top_k=5)
    monkeypatch.setitem(gate._CHUNK_ELEMENTS, "cpu", 200)
    assert torch.equal(select_blocks(q, k, seq, block_size=4, top_k=5), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_key_never_lets_a_foreign_block_in(dtype: torch.dtype, sign: float) -> None:
    k = torch.ones(12, 1, 1, dtype=dtype)
    k[6] = sign * torch.nan
    q = torch.ones(12, 1, 1, dtype=dtype)
    picks = select_blocks(q, k, SequenceInfo([0, 4, 12]), block_size=2, top_k=3)[:, 0]
    blocks = SequenceInfo([0, 4, 12]).blocks(2)
    for row, first, own in zip(picks.tolist(), blocks.first_T.tolist(), blocks.own_T.tolist(), strict=True):
        others = [block for block in row[1:] if block >= 0]
        assert all(first <= block < own for block in others), (row, first, own)
        assert len(set(others)) == len(others) == min(2, own - first)


def test_refuses_part_of_the_keys() -> None:
    seq = SequenceInfo([0, 8], k_positions=[0, 1])
    with pytest.raises(ValueError, match="means_from_sums"):
        select_blocks(torch.ones(8, 1, 2), torch.ones(2, 1, 2), seq, block_size=2, top_k=2)
