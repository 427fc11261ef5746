"""Where every query and key sits: document bounds and positions of one packed batch.

`SequenceInfo` is data, not ranks. Whoever knows the lengths (the loader, a context-parallel layout) builds it on the
host once; every layer of every step on that batch reads it. All sizes are therefore known without asking a device, and
the tensors that a device needs are copied there once and kept on the object itself.

Letters: T query tokens, S key rows of the whole batch, N blocks, E documents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from moba_train.attention.lazy import kept

__all__ = ["BlockTable", "DenseRun", "DeviceSequence", "KeyWindow", "SequenceInfo", "copy_to"]


_Made = TypeVar("_Made")


class DeviceSequence(NamedTuple):
    """The batch's positions on one device."""

    cu_seqlens: Tensor  # int32 [E + 1]
    q_positions: Tensor  # int64 [T], materialised also when the queries are all rows
    k_positions: Tensor | None  # int64 [S_held], None when all S rows are held


class DenseRun(NamedTuple):
    """Queries q_start..q_end see held keys k_start..k_diagonal fully and k_diagonal..k_end causally.

    The causal part is square (query q_start + i sees key k_diagonal + j for j <= i) or empty.
    """

    q_start: int
    q_end: int
    k_start: int
    k_diagonal: int
    k_end: int


class KeyWindow(NamedTuple):
    """What a causal convolution must know of every held key row."""

    reach_S: Tensor  # int32: how many rows before it, without a gap, are held and of its document
    query_S: Tensor  # int32: the query that sits at the row, -1 for none
    row_T: Tensor  # int64: the held row at which each query sits


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Block bounds for one block size, int64. Rows are global; *held* rows index the k and v that are passed in.

    `held_start_N` and `held_end_N` equal `start_N` and `end_N` unless the sequence has `k_positions`.
    """

    block_size: int
    num_blocks: int
    max_block: int  # longest block, in rows
    start_N: Tensor
    end_N: Tensor
    document_N: Tensor
    held_start_N: Tensor
    held_end_N: Tensor
    query_start_N: Tensor  # queries whose own block is n are rows query_start_N[n] .. query_end_N[n] of q
    query_end_N: Tensor
    first_block: Tensor  # [E + 1], first block of every document
    own_T: Tensor  # block that holds the query
    first_T: Tensor  # first block of the query's document: its candidates are first_T .. own_T - 1
    limit_T: Tensor  # held rows before limit_T are at or before the query's position
    _on: dict[torch.device, BlockTable] = field(default_factory=dict, repr=False)

    def behind_first(self) -> BlockTable:
        """The same blocks, with the candidates of every query beginning behind the first."""
        return replace(self, first_T=torch.minimum(self.first_T + 1, self.own_T), _on={})

    def on(self, device: torch.device | str) -> BlockTable:
        """The same table with its tensors on `device`, copied there once."""
        device = torch.device(device)
        if device.type == "cpu":
            return self
        if device not in self._on:
            host = {f.name: getattr(self, f.name) for f in fields(self)}
            moved: dict[str, Any] = {name: copy_to(x, device) for name, x in host.items() if isinstance(x, Tensor)}
            self._on[device] = replace(self, **moved, _on={})
        return self._on[device]


class SequenceInfo:
    """Document bounds over the S key rows, the rows of the queries and, for partial attention, the rows of the keys.

    Args:
        cu_seqlens: host ints [E + 1] from 0 to S, non-decreasing; document e starts at row cu_seqlens[e]. Empty
            documents are legal. Padding is a document of its own.
        q_positions: host ints [T], strictly increasing: the key row at which each query sits. None: all S rows.
        k_positions: host ints [S_held], strictly increasing: the rows present in the k and v passed to an op, which
            then attends to those only (*partial attention*, merged by `merge`). None: all S rows.

    Raises:
        ValueError: bounds that do not cover the rows, positions that are not increasing or out of range, or tensors
            that live on a device (reading them would stall it).
    """

    def __init__(
        self,
        cu_seqlens: Sequence[int] | Tensor,
        q_positions: Sequence[int] | Tensor | None = None,
        k_positions: Sequence[int] | Tensor | None = None,
    ) -> None:
        self.cu_seqlens = _host_ints(cu_seqlens, "cu_seqlens")
        bounds = self.cu_seqlens
        if len(bounds) == 0 or bounds[0] != 0 or bool((bounds.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens must start at 0 and never decrease, got {bounds.tolist()[:8]}...; "
                "pass the running sum of the document lengths with a leading 0"
            )
        self.num_keys = int(bounds[-1])
        if self.num_keys > torch.iinfo(torch.int32).max:
            raise ValueError(f"cu_seqlens must fit 32 bits, got {self.num_keys} rows; split the batch")
        self.num_documents = len(bounds) - 1
        self.max_document = int(bounds.diff().max()) if self.num_documents else 0
        self.q_positions = _positions(q_positions, "q_positions", self.num_keys)
        self.k_positions = _positions(k_positions, "k_positions", self.num_keys)
        self.num_queries = self.num_keys if self.q_positions is None else len(self.q_positions)
        self.num_held = self.num_keys if self.k_positions is None else len(self.k_positions)
        self._made: dict[Hashable, Any] = {}

    def __repr__(self) -> str:
        return (
            f"SequenceInfo(documents={self.num_documents}, queries={self.num_queries}, keys={self.num_keys}, "
            f"held={self.num_held})"
        )

    def on(self, device: torch.device | str) -> DeviceSequence:
        """Bounds and positions as tensors on `device`, copied there once."""
        device = torch.device(device)

        def build() -> DeviceSequence:
            held = None if self.k_positions is None else copy_to(self.k_positions, device)
            bounds = self.cu_seqlens.to(torch.int32)
            return DeviceSequence(copy_to(bounds, device), copy_to(self._query_rows, device), held)

        return self.once(("on", device), build)

    def blocks(self, block_size: int, *, skip_first: bool = False) -> BlockTable:
        """Host table of the blocks of `block_size` tokens, counted from each document's start; built once per size.
        With `skip_first` a document's first block is no query's candidate."""
        if skip_first:
            return self.once(("behind the first block", block_size), lambda: self.blocks(block_size).behind_first())
        return self.once(("blocks", block_size), lambda: self._build_blocks(block_size))

    def window(self, width: int, device: torch.device | str) -> KeyWindow:
        """For a convolution over a key and the `width` - 1 keys before it, on `device`; built once per width.

        Raises:
            ValueError: if a query's key, or one of the width - 1 before it in its document, is not held.
        """
        device = torch.device(device)
        key = ("window", width, device)
        return self.once(key, lambda: KeyWindow(*(copy_to(x, device) for x in self._build_window(width))))

    @property
    def runs(self) -> list[DenseRun]:
        """Dense causal attention cut into rectangles and squares: maximal runs of neighbouring queries; made once."""
        return self.once(
            "runs", lambda: self._cut(self._document_of(self._query_rows), self._held_before(self.cu_seqlens))
        )

    def own_runs(self, block_size: int) -> list[DenseRun]:
        """`runs` of causal attention within the queries' own blocks of `block_size` tokens."""
        table = self.blocks(block_size)
        return self._cut(table.own_T, table.held_start_N)

    def once(self, key: Hashable, build: Callable[[], _Made]) -> _Made:
        """What `build` makes of this batch, made on the first call with `key` and kept with the batch."""
        return kept(self._made, key, build)

    def _cut(self, part_T: Tensor, first_of_part: Tensor) -> list[DenseRun]:
        # Runs within parts (documents or blocks): query t sees the keys of part_T[t], from held row first_of_part on.
        rows = self._query_rows
        if len(rows) == 0:
            return []
        before = self._held_before(rows)
        held = self._held_before(rows + 1) - before
        new_run = (rows.diff() != 1) | (part_T.diff() != 0) | (held.diff() != 0)
        start = torch.cat([torch.zeros(1, dtype=torch.int64), new_run.nonzero().flatten() + 1])
        end = torch.cat([start[1:], torch.tensor([len(rows)])])
        diagonal = before[start]
        stop = diagonal + held[start] * (end - start)
        first = first_of_part[part_T[start]]
        return [DenseRun(*run) for run in torch.stack([start, end, first, diagonal, stop], 1).tolist()]

    @cached_property
    def _query_rows(self) -> Tensor:
        return torch.arange(self.num_keys) if self.q_positions is None else self.q_positions

    def _document_of(self, rows: Tensor) -> Tensor:
        # right=True steps over empty documents, which own no row.
        return torch.searchsorted(self.cu_seqlens[1:].contiguous(), rows, right=True)

    def _held_before(self, rows: Tensor) -> Tensor:
        """How many held keys lie before each global row: the local index at which that row is or would be."""
        return rows if self.k_positions is None else torch.searchsorted(self.k_positions, rows)

    def _build_window(self, width: int) -> KeyWindow:
        rows = torch.arange(self.num_keys) if self.k_positions is None else self.k_positions
        place = torch.arange(len(rows))
        offset_S = rows - self.cu_seqlens[self._document_of(rows)]
        gap = torch.ones(len(rows), dtype=torch.bool)
        gap[1:] = rows.diff() != 1
        reach_S = torch.minimum(offset_S, place - torch.where(gap, place, 0).cummax(0).values)
        row_T = self._held_before(self._query_rows)
        held = self._held_before(self._query_rows + 1) > row_T
        if not bool(held.all()) or bool((reach_S[row_T] < offset_S[row_T].clamp(max=width - 1)).any()):
            raise ValueError(
                f"a convolution of width {width} needs the key of each query and the {width - 1} before it in its "
                "document; k_positions holds too few"
            )
        query_S = torch.full((len(rows),), -1, dtype=torch.int32)
        query_S[row_T] = torch.arange(len(row_T), dtype=torch.int32)
        return KeyWindow(reach_S.to(torch.int32), query_S, row_T)

    def _build_blocks(self, block_size: int) -> BlockTable:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        blocks_per_document = (self.cu_seqlens.diff() + block_size - 1) // block_size
        first_block = torch.cat([torch.zeros(1, dtype=torch.int64), blocks_per_document.cumsum(0)])
        num_blocks = int(first_block[-1])
        document_N = torch.arange(self.num_documents).repeat_interleave(blocks_per_document)
        rank_in_document = torch.arange(num_blocks) - first_block[document_N]
        start_N = self.cu_seqlens[document_N] + rank_in_document * block_size
        end_N = torch.minimum(start_N + block_size, self.cu_seqlens[document_N + 1])

        rows = self._query_rows
        document_T = self._document_of(rows)
        first_T = first_block[document_T]
        return BlockTable(
            block_size=block_size,
            num_blocks=num_blocks,
            max_block=min(block_size, self.max_document),
            start_N=start_N,
            end_N=end_N,
            document_N=document_N,
            held_start_N=self._held_before(start_N),
            held_end_N=self._held_before(end_N),
            query_start_N=torch.searchsorted(rows, start_N),
            query_end_N=torch.searchsorted(rows, end_N),
            first_block=first_block,
            own_T=first_T + (rows - self.cu_seqlens[document_T]) // block_size,
            first_T=first_T,
            limit_T=self._held_before(rows + 1),
        )


def _host_ints(values: Sequence[int] | Tensor, name: str) -> Tensor:
    if isinstance(values, Tensor) and values.device.type != "cpu":
        raise ValueError(f"{name} must be on the host, got a tensor on {values.device}; build it with the batch")
    tensor = torch.as_tensor(values)
    if tensor.numel() and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise ValueError(f"{name} must hold whole numbers, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(tensor.shape)}")
    # A copy: a caller that reuses its buffer must not change a batch under way.
    return tensor.detach().to(torch.int64, copy=True).contiguous()


def _positions(values: Sequence[int] | Tensor | None, name: str, num_keys: int) -> Tensor | None:
    if values is None:
        return None
    positions = _host_ints(values, name)
    if len(positions) and (positions[0] < 0 or positions[-1] >= num_keys):
        raise ValueError(
            f"{name} must lie in 0 .. {num_keys - 1}, the rows that cu_seqlens covers, got "
            f"{int(positions[0])} .. {int(positions[-1])}"
        )
    if bool((positions.diff() <= 0).any()):
        raise ValueError(f"{name} must be strictly increasing; sort the rows and drop repeats")
    return positions


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, without waiting for its stream."""
    # From pageable memory the copy would wait for the stream.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
