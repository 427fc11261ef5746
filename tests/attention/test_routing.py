"""Groups of key heads whose pairs 32-bit ids can tell apart; `route` itself: test_kernels_interpreter.py."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moba_train.attention.kernels import routing


def picks(tokens: int, heads: int, top_k: int) -> torch.Tensor:
    return torch.empty(tokens, heads, top_k, device="meta")


@pytest.mark.parametrize(
    "heads, key_heads, most, limit, expected",
    [
        (6, 3, None, 1 << 31, [(0, 3)]),
        (6, 3, 2, 1 << 31, [(0, 2), (2, 3)]),
        (6, 3, 0, 1 << 31, [(0, 1), (1, 2), (2, 3)]),  # of staging: at least one at a time
        (6, 3, None, 160 + 1, [(0, 2), (2, 3)]),  # 10 queries x 2 heads x 4 picks a key head
        (6, 3, None, 160, [(0, 1), (1, 2), (2, 3)]),
        (8, 8, 5, 1 << 31, [(0, 4), (4, 8)]),  # of about one size
    ],
)
def test_groups(
    heads: int, key_heads: int, most: int | None, limit: int, expected: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "_MOST_IDS", limit)
    found = routing.head_groups(picks(10, heads, 4), key_heads, most)
    assert [(group.start, group.stop) for group in found] == expected


def test_pairs_of_one_key_head_beyond_32_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="8 heads a key head, times top_k=256, are more pairs than 32 bits"):
        routing.head_groups(picks(1 << 20, 64, 256), 8)
