"""Which rows the `flash` backend stages at a time (flash.py), and those of its backward on a second stream.

S held key rows, H query heads, D head dim, P room for pairs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moba_train.attention.kernels.gather import gather, sum_parts
from moba_train.attention.kernels.routing import PairLists, route
from moba_train.attention.second_stream import SecondStream

__all__ = ["BackwardQueries", "Group", "groups_of"]

# Rows staged for a pair of a query and a block, and the bytes of all at a time, in multiples of q's. Forward: a query
# and its result. Backward: queries, later dq, of two pieces; dout; fp32 dq, as large as two. So it needs little more
# than a dense backward's fp32 dq, dk and dv.
_FORWARD_ROWS, _FORWARD_STAGING = 2, 3.0
_BACKWARD_ROWS, _BACKWARD_STAGING = 5, 3.75
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
    rows_staged, staging = (_BACKWARD_ROWS, _BACKWARD_STAGING) if backward else (_FORWARD_ROWS, _FORWARD_STAGING)
    num_tokens, num_heads, head_dim = q_THD.shape
    num_key_heads = k_SGD.shape[1]
    ratio = num_heads // num_key_heads
    row_bytes = q_THD.element_size() * head_dim
    budget = max(_STAGING_FLOOR, staging * q_THD.numel() * q_THD.element_size())
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


class _Staged(NamedTuple):
    at: tuple[slice, slice]
    lists: PairLists
    q_PD: Tensor  # later dq


class BackwardQueries:
    """Queries of the backward's pieces, and their dq, on a second stream beside the library's kernels.

    Those multiply, this moves bytes: during a piece's kernel the last piece's dq is added up and the next piece's
    queries are gathered in its place. Most of it runs where the kernel's last programs leave multiprocessors idle
    (benchmarks/LOG.md, entry 14).
    """

    def __init__(
        self, q_THD: Tensor, dq_THD: Tensor, picks_THK: Tensor, groups: list[Group], deterministic: bool
    ) -> None:
        self._q_THD, self._dq_THD, self._picks_THK = q_THD, dq_THD, picks_THK
        self._deterministic = deterministic
        self._waiting = [(group, at) for group in reversed(groups) for at in reversed(group.pieces)]
        most_pairs = max(_rows(at) for _, at in self._waiting) * (picks_THK.shape[2] - 1)
        self._rooms = [q_THD.new_empty(most_pairs, q_THD.shape[2]) for _ in self._waiting[:2]]
        self._stream = SecondStream(q_THD.device)
        self._last: _Staged | None = None
        self._present: _Staged | None = None
        self._stream.follow()
        self._coming = self._stage()

    def next(self) -> tuple[Tensor, PairLists]:
        """Queries of the next piece, whose room is for its dq, and where they come from."""
        assert self._coming is not None
        self._stream.join()
        self._stream.follow()  # of the last piece's kernel; that of this one is not launched yet
        self._last, self._present, self._coming = self._present, self._coming, None
        return self._present.q_PD, self._present.lists

    def beside(self) -> None:
        """Call when the present piece's kernel is launched."""
        self._take_home(self._last)
        self._last = None
        self._coming = self._stage()

    def end(self) -> None:
        """Call after the last piece: its dq goes home."""
        self._stream.follow()
        self._take_home(self._present)
        self._stream.join()

    def _take_home(self, done: _Staged | None) -> None:
        if done is not None:
            with self._stream.work():
                sum_parts(self._dq_THD[done.at], done.q_PD, done.lists)

    def _stage(self) -> _Staged | None:
        if not self._waiting:
            return None
        group, at = self._waiting.pop()
        room_PD = self._rooms[len(self._waiting) % len(self._rooms)]
        with self._stream.work():
            picks_tHK = self._picks_THK[at]
            lists = route(picks_tHK, group.size, group.num_blocks, deterministic=self._deterministic, places=True)
            q_PD = room_PD[: lists.pairs.shape[0]]
            gather(lists, picks_tHK.shape[2], self._q_THD[at], to_PD=q_PD)
        return _Staged(at, lists, q_PD)
