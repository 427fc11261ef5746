"""Layouts as lists: no processes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from moba_train.context_parallel.layout import Layout, balanced, causal_pairs, contiguous, zigzag
from moba_train.context_parallel.rows import to_natural_order, to_rank_order

RULES = [zigzag, contiguous, balanced]


def test_zigzag_pairs_an_early_with_a_late_chunk():
    layout = zigzag(8, 2)
    assert [layout.positions(rank) for rank in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert layout.chunks == (((0, 2), (6, 8)), ((2, 6),))
    assert (layout.length, layout.num_ranks, layout.rows_per_rank) == (8, 2, 4)


def test_contiguous_gives_equal_runs():
    layout = contiguous(6, 3)
    assert [layout.positions(rank) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_zigzag_is_megatron_cores_own():
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    length, num_ranks = 48, 4
    layout = zigzag(length, num_ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_state, "get_context_parallel_world_size", lambda *_: num_ranks)
        # The index that picks the chunks asks for pinned memory, which a machine without a GPU has not.
        patch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
        patch.setattr(torch.Tensor, "pin_memory", lambda self, *_, **__: self)
        for rank in range(num_ranks):
            patch.setattr(parallel_state, "get_context_parallel_rank", lambda *_, rank=rank: rank)
            batch = get_batch_on_this_cp_rank({"tokens": torch.arange(length)[None]})
            assert layout.positions(rank) == batch["tokens"][0].tolist()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
def test_every_row_has_one_holder_and_positions_increase(rule, num_ranks):
    layout = rule(num_ranks * 2 * 7, num_ranks)
    held = [layout.positions(rank) for rank in range(num_ranks)]
    assert all(rows == sorted(set(rows)) and len(rows) == layout.rows_per_rank for rows in held)
    assert sorted(row for rows in held for row in rows) == list(range(layout.length))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_rank_order_and_back(rule, num_ranks):
    layout = rule(num_ranks * 6, num_ranks)
    natural = torch.arange(layout.length)
    ranked = to_rank_order(natural, layout)
    assert ranked.tolist() == [row for rank in range(num_ranks) for row in layout.positions(rank)]
    assert torch.equal(to_natural_order(ranked, layout), natural)


def test_no_copy_where_the_orders_agree():
    layout, rows = contiguous(12, 3), torch.arange(12)
    assert to_natural_order(rows, layout) is rows
    assert to_rank_order(rows, layout) is rows


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("outer, inner", [(2, 2), (2, 3), (4, 2), (1, 4), (3, 1)])
def test_groups_of_ranks_hold_the_same_layout_one_level_up(rule, outer, inner):
    ranks = outer * inner
    layout = rule(ranks * 4, ranks)
    across = layout.across(inner)
    if rule is not balanced:
        assert across == rule(layout.length, outer)
    for group in range(outer):
        inside, rows = layout.inside(inner, group), across.positions(group)
        for member in range(inner):
            assert [rows[i] for i in inside.positions(member)] == layout.positions(group * inner + member)


@pytest.mark.parametrize("rule, remedy", [(zigzag, "12"), (contiguous, "12"), (balanced, "12")])
def test_lengths_that_do_not_divide_name_the_remedy(rule, remedy):
    with pytest.raises(ValueError, match=f"10 rows .* pad the batch to {remedy} rows"):
        rule(10, 3)


def test_no_rows_at_all():
    assert zigzag(0, 2) == Layout(0, ((), ()))


def test_causal_pairs_by_hand():
    # Documents of 3, 0 and 2 rows: the queries see 1, 2, 3 and 1, 2 keys.
    assert causal_pairs(range(6), [0, 3, 3, 5]) == [0, 1, 3, 6, 7, 9]


def imbalance(layout: Layout, cost_T: torch.Tensor) -> float:
    """Work of the busiest rank over the mean."""
    total = torch.cat([torch.zeros(1, dtype=torch.float64), cost_T.double().cumsum(0)]).tolist()
    work = [sum(total[stop] - total[start] for start, stop in chunks) for chunks in layout.chunks]
    return max(work) * layout.num_ranks / sum(work)


def costs(bounds: list[int]) -> dict[str, torch.Tensor]:
    """Keys that each query attends to: fully, and by MoBA at the settings of short and of long contexts."""
    offset = torch.cat([torch.arange(stop - start) for start, stop in itertools.pairwise(bounds)])
    moba = {
        f"moba-{block}-{top_k}": (offset // block).clamp(max=top_k - 1) * block + offset % block + 1
        for block, top_k in ((512, 3), (512, 12), (4096, 12))
    }
    return {"full": offset + 1, **moba}


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_one_long_document_is_balanced(num_ranks):
    length = 2**18
    cost = costs([0, length])
    assert imbalance(zigzag(length, num_ranks), cost["full"]) <= 1.05
    assert imbalance(zigzag(length, num_ranks), cost["moba-512-12"]) <= 1.05
    # 12 blocks of 4096 reach over a fifth of this document: zigzag is 10 % off until it is twice as long.
    assert imbalance(zigzag(length, num_ranks), cost["moba-4096-12"]) > 1.05
    assert all(imbalance(balanced(length, num_ranks), cost_T) <= 1.05 for cost_T in cost.values())


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("mean, sigma", [(4096, 1.0), (8192, 1.5), (16384, 2.0)])
def test_packed_documents_are_balanced_by_the_document_aware_layout(num_ranks, mean, sigma):
    length, generator = 2**18, torch.Generator().manual_seed(num_ranks)
    bounds = [0]
    while bounds[-1] < length:
        document = (torch.randn((), generator=generator) * sigma + math.log(mean) - sigma**2 / 2).exp()
        bounds.append(min(length, bounds[-1] + max(1, int(document))))
    layout = balanced(length, num_ranks, bounds)
    for cost_T in costs(bounds).values():
        assert imbalance(layout, cost_T) <= 1.15
    # What the layout is for:
    assert num_ranks == 2 or imbalance(zigzag(length, num_ranks), costs(bounds)["full"]) > 1.15
