"""The all-to-all strategy: rows are swapped for heads, so each rank attends with few heads over the whole context.

A rank holds H / c query heads and G / c key heads of all rows while it attends; with fewer key heads than ranks (c a
multiple of G) each key head is sent to the c / G ranks whose query heads use it. Several key heads per rank are
taken one at a time, so that the next one's rows travel under the present one's attention. Nothing is gathered again in
backward: q, k, v and out of a rank's heads are as large as those of its rows.

Letters: `c` ranks, `t` rows of this rank, `T` rows of all ranks (they are queries and keys alike), `H` query heads, `G`
key heads, `h` heads of one slice on one rank, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.attention import SequenceInfo
from moba_train.context_parallel.comm import Pending, pipelined, start_all_to_all
from moba_train.context_parallel.copies import contiguous, copy_into
from moba_train.context_parallel.layout import Layout
from moba_train.context_parallel.rows import natural_order, to_rank_order
from moba_train.context_parallel.subgraph import Subgraph, record, take_graphs

__all__ = ["attend_all_to_all"]


def attend_all_to_all(
    op: Callable,
    group: dist.ProcessGroup,
    layout: Layout,
    q_tHD: Tensor,
    k_tGD: Tensor,
    v_tGD: Tensor,
    seq_all_rows: SequenceInfo,
    *,
    overlap: bool = True,
    one_by_one: bool,
    picks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`op` of some heads over the rows of all ranks of `group`, brought back to this rank's rows: (out_tHD, lse_tH).

    `seq_all_rows` describes those rows; `layout` says how the ranks share them. `one_by_one`: the op sees one key head
    at a time, which overlap needs. Raises ValueError when the heads cannot be dealt to the ranks.
    """
    num_ranks, num_heads, num_key_heads = group.size(), q_tHD.shape[1], k_tGD.shape[1]
    check_heads(num_ranks, num_heads, num_key_heads)
    num_slices = max(1, num_key_heads // num_ranks) if one_by_one else 1
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in (q_tHD, k_tGD, v_tGD))
    call = _Call(op, group, layout, seq_all_rows, num_slices, options, overlap, differentiate)
    return _AllToAllAttention.apply(call, q_tHD, k_tGD, v_tGD, picks)


def check_heads(num_ranks: int, num_heads: int, num_key_heads: int) -> None:
    """Raise ValueError unless every rank can have the same number of query heads, with the key heads that they use."""
    if num_heads % num_ranks or (num_key_heads % num_ranks and num_ranks % num_key_heads):
        raise ValueError(
            f"all_to_all cannot deal {num_heads} query and {num_key_heads} key heads to {num_ranks} ranks: query heads "
            "must be divisible by the ranks, and key heads by the ranks or the ranks by the key heads; use all_gather "
            "or ring, or another number of context or tensor ranks"
        )


@dataclass(frozen=True)
class _Call:
    op: Callable
    group: dist.ProcessGroup
    layout: Layout
    seq: SequenceInfo
    num_slices: int
    options: dict[str, Any]
    overlap: bool
    differentiate: bool

    def attend(self, picks: list[Tensor], q_ThD: Tensor, k_ThD: Tensor, v_ThD: Tensor) -> tuple[Tensor, Tensor]:
        return self.op(q_ThD, k_ThD, v_ThD, self.seq, **({"picks": picks[0]} if picks else {}), **self.options)

    def fetch(self, i: int, *tensors: Tensor) -> Pending:
        """Rank-ordered rows of all ranks, of this rank's share of slice i of the heads: [t, H, ...] -> [T, h, ...]."""
        by_rank = [contiguous(self._heads(x, i).transpose(0, 1)).flatten(0, 1) for x in tensors]
        return Pending.all([start_all_to_all(x, self.group) for x in by_rank])

    def deliver(self, i: int, tensors: list[Tensor], into: list[Tensor]) -> Pending:
        """The way back: natural-ordered [T, h, ...] into slice i of the heads of [t, H, ...]."""

        def write(received: list[Tensor]) -> None:
            for x, total in zip(received, into, strict=True):
                self._write(x, total, i)

        return Pending.all([start_all_to_all(to_rank_order(x, self.layout), self.group) for x in tensors]).then(write)

    def _heads(self, x_tH: Tensor, i: int) -> Tensor:
        """[t, c, h, ...]: the heads of slice i that go to each rank, a view as far as possible."""
        num_ranks, num_heads = self.group.size(), x_tH.shape[1]
        if num_heads < num_ranks:
            x_tH = x_tH.repeat_interleave(num_ranks // num_heads, 1)
        x_tcH = x_tH.unflatten(1, (num_ranks, -1))
        width = x_tcH.shape[2] // self.num_slices
        return x_tcH[:, :, i * width : (i + 1) * width]

    def _write(self, received: Tensor, total_tH: Tensor, i: int) -> None:
        num_ranks, num_heads = self.group.size(), total_tH.shape[1]
        x_tch = received.unflatten(0, (num_ranks, total_tH.shape[0])).transpose(0, 1)
        if num_heads < num_ranks:  # gradients of one key head from the ranks it was sent to
            total_tH.copy_(x_tch.unflatten(1, (num_heads, -1)).sum(2).flatten(1, 2))
        else:
            copy_into(self._heads(total_tH, i), x_tch)


class _AllToAllAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, q_tHD: Tensor, k_tGD: Tensor, v_tGD: Tensor, picks_tHK: Tensor | None):
        inputs = [x for x in (q_tHD, k_tGD, v_tGD, picks_tHK) if x is not None]
        graphs: list[Subgraph] = []
        saved: list[list[Tensor]] = []
        results: list[Tensor] = []

        def attend(i: int, received: list[Tensor]) -> list[Tensor]:
            q, k, v, *picks = natural_order(received, call.layout)
            if not call.differentiate:
                return list(call.attend(picks, q, k, v))
            graph, outputs = record(partial(call.attend, picks), [q, k, v])
            graphs.append(graph)
            saved.append(graph.take_saved())
            return outputs

        def deliver(i: int, outputs: list[Tensor]) -> Pending:
            if not results:
                results.extend(x.new_empty(*q_tHD.shape[:2], *x.shape[2:]) for x in outputs)
            return call.deliver(i, outputs, results)

        pipelined(call.num_slices, lambda i: call.fetch(i, *inputs), attend, deliver, overlap=call.overlap)
        ctx.call, ctx.graphs, ctx.num_saved = call, graphs, [len(x) for x in saved]
        ctx.save_for_backward(*chain(*saved))
        ctx.set_materialize_grads(False)  # an op may do less for a gradient that is not there
        ctx.like = [torch.empty_like(x, device="meta") for x in (q_tHD, k_tGD, v_tGD)]
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out_tHD: Tensor | None, grad_lse_tH: Tensor | None):
        call, graphs, saved = ctx.call, take_graphs(ctx), iter(ctx.saved_tensors)
        used = [x is not None for x in (grad_out_tHD, grad_lse_tH)]
        given = [x for x in (grad_out_tHD, grad_lse_tH) if x is not None]
        device = given[0].device
        totals = [torch.empty_like(x, device=device) for x in ctx.like]

        def differentiate(i: int, received: list[Tensor]) -> list[Tensor]:
            grads = iter(natural_order(received, call.layout))
            kept = list(islice(saved, ctx.num_saved[i]))
            return graphs[i].gradients([next(grads) if is_used else None for is_used in used], kept)

        pipelined(
            call.num_slices,
            lambda i: call.fetch(i, *given),
            differentiate,
            lambda i, grads: call.deliver(i, grads, totals),
            overlap=call.overlap,
        )
        return None, *totals, None
