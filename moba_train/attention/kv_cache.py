"""Keys, values and block sums of one layer for one document that grows: chunked prefill, then token by token.

Rows are appended once and never change, so neither does the mean of a block that is full: a step adds its rows to the
fp64 sums of the blocks they fall into and every pick is made from means, without a look at earlier keys.
Invariant: the sums are those of `gate.block_sums` over all rows so far (on a CPU added up in the same order).

Letters: T new rows, S rows so far, C capacity, H query heads, G key heads, D head dim, N blocks, K = top_k picks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moba_train.attention.gate import means_from_sums
from moba_train.attention.ops import select_from_means
from moba_train.attention.sequence import SequenceInfo

__all__ = ["LayerCache"]


class LayerCache:
    """Grows by doubling. block_size: of a MoBA layer, None for full attention; reserve: rows to make room for."""

    def __init__(self, block_size: int | None, reserve: int = 0) -> None:
        self.block_size, self.length = block_size, 0
        self._reserve = reserve
        self._keys_CGD: Tensor | None = None
        self._values_CGD: Tensor | None = None
        self._sums_NGD: Tensor | None = None
        self._recent: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """[S, G, D], a view."""
        assert self._keys_CGD is not None, "nothing was appended yet"
        return self._keys_CGD[: self.length]

    @property
    def values(self) -> Tensor:
        """[S, G, D], a view."""
        assert self._values_CGD is not None, "nothing was appended yet"
        return self._values_CGD[: self.length]

    @torch.no_grad()
    def append(self, k_TGD: Tensor, v_TGD: Tensor) -> None:
        """Take in the document's next T rows; k after rotary embedding."""
        start, self.length = self.length, self.length + k_TGD.shape[0]
        self._keys_CGD = _with_room(self._keys_CGD, self.length, self._reserve, k_TGD, k_TGD.dtype)
        self._values_CGD = _with_room(self._values_CGD, self.length, self._reserve, v_TGD, v_TGD.dtype)
        self._keys_CGD[start : self.length] = k_TGD
        self._values_CGD[start : self.length] = v_TGD
        if self.block_size is not None:
            blocks, reserve = (-(-rows // self.block_size) for rows in (self.length, self._reserve))
            self._sums_NGD = _with_room(self._sums_NGD, blocks, reserve, k_TGD, torch.float64)
            block_T = torch.arange(start, self.length, device=k_TGD.device) // self.block_size
            self._sums_NGD.index_add_(0, block_T, k_TGD.double())

    @torch.no_grad()
    def with_recent(self, raw_TGD: Tensor, reach: int) -> tuple[Tensor, SequenceInfo]:
        """The next rows before a key convolution, behind the last `reach` raw ones -> held keys, and where they are.

        Comes before `append`; the last `reach` rows are kept for the next call.
        """
        held = raw_TGD if self._recent is None else torch.cat([self._recent, raw_TGD])
        total = self.length + raw_TGD.shape[0]
        self._recent = held[max(0, held.shape[0] - reach) :].clone()
        held_rows = torch.arange(total - held.shape[0], total)
        return held, SequenceInfo([0, total], torch.arange(self.length, total), held_rows)

    def select(self, q_THD: Tensor, seq: SequenceInfo, *, block_size: int, top_k: int, **options: Any) -> Tensor | None:
        """Picks of the queries from the cached means -> int32 [T, H, K], as `select_blocks` over all keys gives.

        `seq` is one document of S rows with the queries' rows; `options` go to `select_from_means`. None where top_k
        blocks cover the document: the op answers with full attention then.
        """
        assert self.block_size == block_size, f"sums are of blocks of {self.block_size}, asked for {block_size}"
        assert seq.num_keys == self.length, (seq.num_keys, self.length)
        if top_k * block_size >= self.length or self._sums_NGD is None:
            return None
        sums_NGD = self._sums_NGD[: seq.blocks(block_size).num_blocks]
        means_NGD = means_from_sums(sums_NGD, seq, block_size, self.keys.dtype)
        return select_from_means(q_THD, means_NGD, seq, block_size=block_size, top_k=top_k, **options)


def _with_room(old: Tensor | None, rows: int, reserve: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`old` or a copy with room for `rows` rows (at first also for `reserve`); rows not yet written are 0."""
    if old is not None and old.shape[0] >= rows:
        return old
    capacity = max(rows, reserve) if old is None else max(rows, 2 * old.shape[0])
    new = like.new_zeros(capacity, *like.shape[1:], dtype=dtype)
    if old is not None:
        new[: old.shape[0]] = old
    return new
