"""The ring strategy: key and value shards pass from rank to rank; partial outputs are merged by log-sum-exp.

A rank holds two shards of K and V at a time, the one it attends to and the one arriving. MoBA's picks are made before
any shard moves, from the block means of the whole context: each rank adds up its rows of every block in fp64, the sums
are summed over ranks, and the mean is rounded once. In backward the shards pass again with their gradients, kept in
fp32 (or wider). Partial outputs are not kept: an op whose backward works from its saved out and lse is given the merged
ones, which makes its gradients the part's share of the whole; any other op computes the part again.

Letters: `t` query rows of this rank, `s` key rows of one rank, `H` query heads, `G` key heads, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.attention import SequenceInfo, block_sums, means_from_sums, select_from_means
from moba_train.context_parallel.comm import Pending, start_shift, start_sum
from moba_train.context_parallel.layout import Layout
from moba_train.context_parallel.rows import with_rows
from moba_train.context_parallel.subgraph import Subgraph, record, take_graphs

__all__ = ["attend_ring", "route"]

_ROUTING = ("block_size", "top_k", "force_first_block", "force_previous_block", "share_picks_in_group")


def attend_ring(
    op: Callable,
    group: dist.ProcessGroup,
    layout: Layout,
    q_tHD: Tensor,
    k_sGD: Tensor,
    v_sGD: Tensor,
    seq: SequenceInfo,
    *,
    overlap: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`op` of this rank's queries over the shards of all ranks, one after the other: (out_tHD, lse_tH).

    An op that is given `block_size` and `top_k` gets `picks` too, unless the caller passes them.
    """
    rank, num_ranks = group.rank(), group.size()
    own = layout.chunks[rank]
    sources = [(rank - step) % num_ranks for step in range(num_ranks)]
    seqs = [with_rows(seq, queries=own, keys=layout.chunks[source]) for source in sources]
    if "block_size" in options and options.get("picks") is None:
        options["picks"] = route(q_tHD, k_sGD, seqs[0], [group], options)
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in (q_tHD, k_sGD, v_sGD))
    return _RingAttention.apply(_Call(op, group, seqs, options, overlap, differentiate), q_tHD, k_sGD, v_sGD)


@torch.no_grad()
def route(
    q_tHD: Tensor, k_sGD: Tensor, seq: SequenceInfo, groups: Sequence[dist.ProcessGroup], options: Mapping[str, Any]
) -> Tensor:
    """The picks of this rank's queries among the blocks of all ranks, by the gate's part of an op's options.

    `seq` holds this rank's rows as k_positions. The context is shared within each of `groups`, one after the other.
    """
    routing = {name: options[name] for name in _ROUTING if name in options}
    block_size = routing["block_size"]
    sums_NGD = block_sums(k_sGD, seq, block_size)
    for group in groups:
        sums_NGD = start_sum(sums_NGD, group).wait()
    means_NGD = means_from_sums(sums_NGD, seq, block_size, k_sGD.dtype)
    return select_from_means(q_tHD, means_NGD, seq, **routing)


@dataclass(frozen=True)
class _Call:
    """`seqs[step]` holds the keys that are here at that step: this rank's own first, then those of the rank before."""

    op: Callable
    group: dist.ProcessGroup
    seqs: list[SequenceInfo]
    options: dict[str, Any]
    overlap: bool
    differentiate: bool

    def attend(self, step: int, q_tHD: Tensor, k_sGD: Tensor, v_sGD: Tensor) -> tuple[Tensor, Tensor]:
        return self.op(q_tHD, k_sGD, v_sGD, self.seqs[step], **self.options)

    def circulate(self, k_sGD: Tensor, v_sGD: Tensor, use: Callable[[int, Tensor, Tensor], None]) -> None:
        """`use` each shard of K and V at its step, while the next one travels."""
        here, arriving = [k_sGD.contiguous(), v_sGD.contiguous()], None
        for step in range(len(self.seqs)):
            last = step + 1 == len(self.seqs)
            if self.overlap and not last:
                arriving = start_shift(here, self.group)
            use(step, *here)
            if not last:
                here = (arriving or start_shift(here, self.group)).wait()


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, q_tHD: Tensor, k_sGD: Tensor, v_sGD: Tensor):
        so_far: list[Tensor] = []
        graphs: list[Subgraph | None] = []
        saved: list[list[Tensor]] = []

        def attend(step: int, k: Tensor, v: Tensor) -> None:
            if call.differentiate:
                graph, (out, lse) = record(partial(call.attend, step), [q_tHD], [k, v])
                fused = graph.works_from_outputs
                graphs.append(graph if fused else None)
                saved.append(graph.take_saved(outputs=False) if fused else [])
            else:
                out, lse = call.attend(step, q_tHD, k, v)
            if not so_far:
                so_far.extend([out.to(lse.dtype, copy=True), lse])  # wide, to be rounded once
            else:
                _merge_into(so_far[0], so_far[1], out, lse)

        call.circulate(k_sGD, v_sGD, attend)
        out_tHD, lse_tH = so_far.pop(0).to(q_tHD.dtype), so_far.pop()
        ctx.call, ctx.graphs, ctx.num_saved = call, graphs, [len(x) for x in saved]
        ctx.set_materialize_grads(False)  # an op may do less for a gradient that is not there
        ctx.save_for_backward(q_tHD, k_sGD, v_sGD, out_tHD, lse_tH, *chain(*saved))
        return out_tHD, lse_tH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out_tHD: Tensor | None, grad_lse_tH: Tensor | None):
        call, graphs = ctx.call, take_graphs(ctx)
        q_tHD, k_sGD, v_sGD, out_tHD, lse_tH, *rest = ctx.saved_tensors
        saved = iter(rest)
        grad_q = torch.zeros_like(q_tHD, dtype=lse_tH.dtype)
        travelling: list[Pending] = []

        def differentiate(step: int, k: Tensor, v: Tensor) -> None:
            kept = list(islice(saved, ctx.num_saved[step]))
            graph, outputs, grads = graphs[step], [out_tHD, lse_tH], [grad_out_tHD, grad_lse_tH]
            if graph is None:
                graph, part = record(partial(call.attend, step), [q_tHD], [k, v])
                kept, grads = graph.take_saved(), _grads_of_part(part, outputs, grads)
                outputs = part
            dq, *parts = graph.gradients(grads, kept, [k, v], outputs)
            grad_q.add_(dq)
            if travelling:
                totals = [total.add_(x) for total, x in zip(travelling.pop().wait(), parts, strict=True)]
            else:
                totals = [x.to(lse_tH.dtype) for x in parts]
            travelling.append(start_shift(totals, call.group))

        call.circulate(k_sGD, v_sGD, differentiate)
        grad_k, grad_v = travelling.pop().wait()  # the last hop took them home
        return None, grad_q.to(q_tHD.dtype), grad_k.to(k_sGD.dtype), grad_v.to(v_sGD.dtype)


def _merge_into(total_tHD: Tensor, lse_tH: Tensor, out_tHD: Tensor, lse_part_tH: Tensor) -> None:
    """`merge` in place. The total's lse is finite: this rank's own shard comes first, where every query sees itself."""
    merged_tH = torch.logaddexp(lse_tH, lse_part_tH)
    total_tHD.mul_((lse_tH - merged_tH).exp_()[..., None])
    total_tHD.addcmul_(out_tHD, (lse_part_tH - merged_tH).exp_()[..., None])
    lse_tH.copy_(merged_tH)


def _grads_of_part(part: list[Tensor], merged: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of one part's (out, lse) from those of the merged ones: the backward of `merge` without its memory.

    Shares w = exp(lse_part - lse): out = sum w * out_part, so d lse_part = w * (dout . (out_part - out) + dlse).
    """
    (out_part, lse_part), (out, lse), (grad_out, grad_lse) = part, merged, grads
    share_tH = (lse_part - lse).exp().masked_fill(lse_part == -torch.inf, 0.0)
    slope_tH = torch.zeros_like(lse) if grad_lse is None else grad_lse
    if grad_out is None:
        return [None, share_tH * slope_tH]
    slope_tH = slope_tH + (grad_out.to(lse.dtype) * (out_part.to(lse.dtype) - out)).sum(-1)
    return [(share_tH[..., None] * grad_out).to(out_part.dtype), share_tH * slope_tH]
