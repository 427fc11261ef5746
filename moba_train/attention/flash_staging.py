"""Which rows the `flash` backend (flash.py) stages at a time.

S held key rows, H query heads, D head dim.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Group", "groups_of"]

# Bytes staged at a time, in multiples of q's, to need little more than a dense backward's fp32 dq, dk and dv.
_STAGING = 3.0
# Rows of q's size staged for a pair of a query and a block: the query and its result; q, dout and fp32 dq.
_FORWARD_ROWS, _BACKWARD_ROWS = 2, 4
_STAGING_FLOOR = 256 * 2**20
_MOST_ELEMENTS = 2**30  # of a staged tensor: far from what 32 bits count


class Group(NamedTuple):
    """A few key heads as one after the other, and its pieces: which (tokens, query heads) are staged at a time."""

    key_heads: slice
    size: int
    num_blocks: int
    pieces: list[tuple[slice, slice]]

    def keys_of(self, k_SGD: Tensor, v_SGD: Tensor, key_bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k and v [size * S, 1, D], and int32 bounds of all heads' blocks."""
        num_keys, _, head_dim = k_SGD.shape
        k, v = (x[:, self.key_heads].transpose(0, 1).reshape(self.size * num_keys, 1, head_dim) for x in (k_SGD, v_SGD))
        starts = torch.arange(self.size, dtype=torch.int32, device=k.device)[:, None] * num_keys + key_bounds[:-1]
        return k, v, torch.cat([starts.flatten(), starts.new_full((1,), self.size * num_keys)])

    def sizes(self, piece: tuple[slice, slice], block_size: int) -> dict[str, Any]:
        # A row picks a block once, so a list holds no more than the rows of its key head.
        return {"max_queries": _rows(piece) // self.size, "max_keys": block_size, "causal": False}


def groups_of(q_THD: Tensor, picks_THK: Tensor, k_SGD: Tensor, key_bounds: Tensor, *, backward: bool) -> list[Group]:
    """Key heads, and the parts of their queries whose staged rows fit the budget of the pass."""
    rows_staged = _BACKWARD_ROWS if backward else _FORWARD_ROWS
    num_tokens, num_heads, head_dim = q_THD.shape
    num_key_heads = k_SGD.shape[1]
    ratio = num_heads // num_key_heads
    row_bytes = q_THD.element_size() * head_dim
    budget = max(_STAGING_FLOOR, _STAGING * q_THD.numel() * q_THD.element_size())
    most_pairs = min(budget // (rows_staged * row_bytes + 32), _MOST_ELEMENTS // head_dim)
    pairs = num_tokens * (picks_THK.shape[2] - 1)  # of a query head
    # One query head each of many key heads rather than many of one: more and shorter lists keep all multiprocessors at
    # work. And part of the heads rather than of the tokens: the first tokens see few blocks.
    size = _even(num_key_heads, most_pairs / pairs)
    step = _even(ratio, most_pairs / (pairs * size))  # query heads of each key head
    if size > 1 and step < ratio:
        step = 1  # so that a slice says which
    tokens_step = _even(num_tokens, num_tokens * most_pairs / (pairs * size * step))
    groups = []
    for first in range(0, num_key_heads, size):
        key_heads = slice(first, min(first + size, num_key_heads))
        count = key_heads.stop - first
        last = key_heads.stop * ratio
        if count > 1 and step == 1:
            heads = [slice(first * ratio + r, last, ratio) for r in range(ratio)]
        else:
            heads = [slice(h, min(h + count * step, last)) for h in range(first * ratio, last, count * step)]
        pieces = [
            (slice(t, min(t + tokens_step, num_tokens)), h) for h in heads for t in range(0, num_tokens, tokens_step)
        ]
        groups.append(Group(key_heads, count, key_bounds.shape[0] - 1, pieces))
    return groups


def _rows(piece: tuple[slice, slice]) -> int:
    tokens, heads = (len(range(part.start, part.stop, part.step or 1)) for part in piece)
    return tokens * heads


def _even(total: int, most: float) -> int:
    """The step of at most `most` (and at least 1) that cuts `total` into parts of about one size."""
    return math.ceil(total / math.ceil(total / max(1, min(total, int(most)))))
