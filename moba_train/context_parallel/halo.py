"""A rank's rows and the few rows before each of them in their document, which other ranks hold: the halo.

What an op over neighbouring rows needs (the key convolution): no rank needs more than `reach` rows per chunk, so the
exchange is a few rows in one all-to-all, whatever the layout and the strategy of attention. Gradients of halo rows go
back to their owners in one more. Both happen on every rank or, where no rank needs a row, on none.

Letters: `t` rows of this rank, `s` those and its halo; trailing dims are free.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.attention import SequenceInfo
from moba_train.context_parallel.comm import start_all_to_all
from moba_train.context_parallel.layout import Chunk, Layout, LayoutRule, coalesce
from moba_train.context_parallel.rows import layout_of, with_rows

__all__ = ["HaloPlan", "halo_plan", "with_halo"]

# Every layer asks the same of a batch.
_plans: WeakKeyDictionary[SequenceInfo, dict[tuple[LayoutRule, int, int, int], HaloPlan]] = WeakKeyDictionary()


@dataclass(frozen=True)
class HaloPlan:
    """Which rows one rank sends, receives and holds then; plain integers.

    sent: this rank's rows for rank 0, then those for rank 1, ...; sent_to[j] of them go to rank j.
    received_from[i]: how many rows come from rank i. needed: whether any rank receives a row.
    pieces: the rows held afterwards, in natural order: (from the received rows?, start, stop).
    rows: the same as global rows.
    """

    sent: tuple[Chunk, ...]
    sent_to: list[int]
    received_from: list[int]
    needed: bool
    pieces: tuple[tuple[bool, int, int], ...]
    rows: tuple[Chunk, ...]


def with_halo(
    x_t: Tensor, seq: SequenceInfo, group: dist.ProcessGroup | None, layout: LayoutRule, reach: int
) -> tuple[Tensor, SequenceInfo]:
    """The rows x_s of this rank and up to `reach` rows before each in its document, and the sequence that says which.

    `seq` has the bounds of the whole context and this rank's rows as queries; in the sequence returned the rows of x_s
    are its keys. A context of one rank gives back x_t and `seq` themselves. Differentiable in x_t.

    Raises:
        ValueError: if x_t does not have as many rows as each rank holds.
    """
    if group is None or group.size() == 1:
        return x_t, seq
    rows, rank = layout_of(seq, layout, group.size()), group.rank()
    if x_t.shape[0] != rows.rows_per_rank:
        raise ValueError(f"{x_t.shape[0]} rows, but each of {group.size()} context ranks holds {rows.rows_per_rank}")
    cache = _plans.setdefault(seq, {})
    key = (layout, group.size(), rank, reach)
    if key not in cache:
        cache[key] = halo_plan(rows, rank, seq.cu_seqlens.tolist(), reach)
    plan = cache[key]
    held = with_rows(seq, queries=rows.chunks[rank], keys=plan.rows)
    return (_Halo.apply(x_t, plan, group) if plan.needed else x_t), held


def halo_plan(layout: Layout, rank: int, cu_seqlens: list[int], reach: int) -> HaloPlan:
    """What `rank` exchanges so that every row of it has the `reach` rows before it, as far as its document goes."""
    wanted = [_missing(chunks, cu_seqlens, reach) for chunks in layout.chunks]
    owners = [_owners(layout, rows) for rows in wanted]
    sent = [[place for owner, place in owners[other] if owner == rank] for other in range(layout.num_ranks)]
    # Rows arrive by owner, in natural order within one.
    by_owner = sorted(range(len(wanted[rank])), key=lambda i: (owners[rank][i][0], wanted[rank][i]))
    arrived = {wanted[rank][i]: place for place, i in enumerate(by_owner)}
    pieces = [(row, True, place, place + 1) for row, place in arrived.items()]
    place = 0
    for start, stop in layout.chunks[rank]:
        pieces.append((start, False, place, place + stop - start))
        place += stop - start
    pieces.sort()
    received_from = [sum(owner == other for owner, _ in owners[rank]) for other in range(layout.num_ranks)]
    return HaloPlan(
        sent=coalesce((place, place + 1) for places in sent for place in places),
        sent_to=[len(places) for places in sent],
        received_from=received_from,
        needed=any(wanted),
        pieces=tuple((arrives, start, stop) for _, arrives, start, stop in pieces),
        rows=coalesce((row, row + stop - start) for row, _, start, stop in pieces),
    )


def _missing(chunks: tuple[Chunk, ...], cu_seqlens: list[int], reach: int) -> list[int]:
    """The rows before each chunk that its first rows need and the rank does not hold, increasing."""
    wanted: set[int] = set()
    for start, _ in chunks:
        document = cu_seqlens[bisect_right(cu_seqlens, start) - 1]
        wanted.update(range(max(document, start - reach), start))
    return sorted(row for row in wanted if not any(start <= row < stop for start, stop in chunks))


def _owners(layout: Layout, rows: list[int]) -> list[tuple[int, int]]:
    """(rank, place among its rows) of each global row."""
    table = []
    for rank, chunks in enumerate(layout.chunks):
        place = 0
        for start, stop in chunks:
            table.append((start, rank, place))
            place += stop - start
    table.sort()
    starts = [start for start, _, _ in table]
    found = ((row, table[bisect_right(starts, row) - 1]) for row in rows)
    return [(rank, place + row - start) for row, (start, rank, place) in found]


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_t: Tensor, plan: HaloPlan, group: dist.ProcessGroup) -> Tensor:
        ctx.plan, ctx.group = plan, group
        sent = torch.cat([x_t[:0], *(x_t[start:stop] for start, stop in plan.sent)])
        received = start_all_to_all(sent, group, plan.received_from, plan.sent_to).wait()
        return torch.cat([(received if arrived else x_t)[start:stop] for arrived, start, stop in plan.pieces])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_s: Tensor) -> tuple[Tensor, None, None]:
        plan = ctx.plan
        own: list[Tensor] = []
        arrived = grad_s.new_empty(sum(plan.received_from), *grad_s.shape[1:])
        row = 0
        for is_halo, start, stop in plan.pieces:
            part = grad_s[row : row + stop - start]
            row += stop - start
            if is_halo:
                arrived[start:stop] = part
            else:
                own.append(part)
        grad_t = torch.cat(own)
        returned = start_all_to_all(arrived, ctx.group, plan.sent_to, plan.received_from).wait()
        row = 0
        for start, stop in plan.sent:
            grad_t[start:stop] += returned[row : row + stop - start]
            row += stop - start
        return grad_t, None, None
