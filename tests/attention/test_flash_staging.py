"""Pieces of the flash backend: every query once, within the budget. (What is done with them: the interpreter.)"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from moba_train.attention import flash_staging
from moba_train.attention.flash_staging import groups_of


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("pairs_of_a_head", [0.2, 0.7, 1.0, 2.5, 9.0, 100.0])
@pytest.mark.parametrize("heads, key_heads", [(8, 2), (6, 6), (4, 1), (9, 3)])
def test_pieces_cover_every_query_once_within_the_budget(
    heads: int, key_heads: int, pairs_of_a_head: float, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget holds the pairs of so many query heads, or of a part of one."""
    tokens, head_dim, top_k = 40, 16, 5
    q, k = torch.empty(tokens, heads, head_dim), torch.empty(100, key_heads, head_dim)
    picks, bounds = torch.empty(tokens, heads, top_k, dtype=torch.int32), torch.empty(11, dtype=torch.int32)
    rows = 4 if backward else 2  # q, dout and fp32 dq; q and out
    most = pairs_of_a_head * tokens * (top_k - 1)
    monkeypatch.setattr(flash_staging, "_STAGING", 0.0)
    monkeypatch.setattr(flash_staging, "_STAGING_FLOOR", most * (rows * 4 * head_dim + 32))
    groups = groups_of(q, picks, k, bounds, backward=backward)
    assert [head for group in groups for head in range(key_heads)[group.key_heads]] == list(range(key_heads))
    staged: Counter[tuple[int, int]] = Counter()
    for group in groups:
        assert group.num_blocks == 10
        ratio = heads // key_heads
        mine = range(group.key_heads.start * ratio, group.key_heads.stop * ratio)
        for at in group.pieces:
            piece = [(t, h) for t in range(tokens)[at[0]] for h in range(heads)[at[1]]]
            assert {h for _, h in piece} <= set(mine)
            assert len(piece) * (top_k - 1) <= most
            # A slice of heads must hold as many of each key head, in their order: lists are made by head number.
            counts = Counter(h // ratio for _, h in piece)
            assert set(counts.values()) == {len(piece) // group.size}
            assert group.sizes(at, 8)["max_queries"] == len(piece) // group.size
            staged.update(piece)
    assert staged == Counter((t, h) for t in range(tokens) for h in range(heads))
