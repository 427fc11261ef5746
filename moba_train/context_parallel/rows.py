"""Rows of tensors between rank order and natural order, and the `SequenceInfo` of a rank's rows.

Rows move by chunk copies: no index tensors, nothing asked of the device.

Letters: `S` rows of all ranks; trailing dims are free.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moba_train.attention import SequenceInfo
from moba_train.context_parallel.layout import Chunk, Layout, LayoutRule

__all__ = ["layout_of", "natural_order", "row_numbers", "to_natural_order", "to_rank_order", "with_rows"]

Chunks = tuple[Chunk, ...]
Rows = Chunks | None  # None: all rows
# Every layer asks the same of a batch, and block tables are dear: the answers live as long as the batch's sequence.
_sequences: WeakKeyDictionary[SequenceInfo, dict[tuple[Rows, Rows], SequenceInfo]] = WeakKeyDictionary()
_layouts: WeakKeyDictionary[SequenceInfo, dict[tuple[LayoutRule, int], Layout]] = WeakKeyDictionary()


def to_natural_order(x_S: Tensor, layout: Layout) -> Tensor:
    """Rank-ordered rows (as an all-gather returns them) in natural order; `x_S` itself where the two agree."""
    return _take(x_S, layout.natural_order)


def natural_order(tensors: list[Tensor], layout: Layout) -> list[Tensor]:
    """`to_natural_order` of each, emptying the list: the memory of one tensor is free for the next."""
    return [to_natural_order(tensors.pop(0), layout) for _ in range(len(tensors))]


def to_rank_order(x_S: Tensor, layout: Layout) -> Tensor:
    """Natural rows in rank order (as a reduce-scatter expects them); `x_S` itself where the two agree."""
    return _take(x_S, layout.rank_order)


def row_numbers(chunks: Chunks) -> Tensor:
    """The rows of these chunks as a host tensor."""
    return torch.cat([torch.arange(0), *(torch.arange(start, stop) for start, stop in chunks)])


def layout_of(seq: SequenceInfo, rule: LayoutRule, num_ranks: int) -> Layout:
    """How `rule` shares the rows of `seq` among this many ranks."""
    cache = _layouts.setdefault(seq, {})
    if (rule, num_ranks) not in cache:
        cache[rule, num_ranks] = rule(seq.num_keys, num_ranks, seq.cu_seqlens.tolist())
    return cache[rule, num_ranks]


def with_rows(seq: SequenceInfo, *, queries: Rows, keys: Rows) -> SequenceInfo:
    """The documents of `seq` with these query rows and these key rows held."""
    cache = _sequences.setdefault(seq, {})
    if (queries, keys) not in cache:
        rows = (None if chunks is None else row_numbers(chunks) for chunks in (queries, keys))
        cache[queries, keys] = SequenceInfo(seq.cu_seqlens, *rows)
    return cache[queries, keys]


def _take(x_S: Tensor, chunks: Chunks) -> Tensor:
    return x_S if len(chunks) <= 1 else torch.cat([x_S[start:stop] for start, stop in chunks])
