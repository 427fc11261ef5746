"""The all-gather strategy: queries stay where they are, keys and values of the whole context come to them.

Key heads are streamed in slices, so only a few heads of the whole context are alive at any time, and they are
gathered again in backward instead of kept. Gradients of K and V are reduce-scattered. Every rank issues the same
collectives in the same order whatever its queries see, so ranks cannot wait for each other in vain.

Letters: `t` query rows of this rank, `s` key rows of this rank, `S` all key rows, `H` query heads, `G` key heads,
`D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.attention import SequenceInfo
from moba_train.context_parallel.comm import Pending, pipelined, start_all_gather, start_reduce_scatter
from moba_train.context_parallel.copies import copy_into
from moba_train.context_parallel.layout import Layout
from moba_train.context_parallel.rows import natural_order, to_rank_order
from moba_train.context_parallel.subgraph import Subgraph, record, take_graphs

__all__ = ["attend_all_gather"]


def attend_all_gather(
    op: Callable,
    group: dist.ProcessGroup,
    layout: Layout,
    q_tHD: Tensor,
    k_sGD: Tensor,
    v_sGD: Tensor,
    seq: SequenceInfo,
    *,
    gather_heads: int | None = None,
    overlap: bool = True,
    picks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`op` of this rank's queries over the keys of all ranks: (out_tHD, lse_tH).

    At most `gather_heads` key heads of the whole context are alive at once (None: all of them, in one slice). With
    `overlap` they are halved between the slice attended to and the slice arriving.
    """
    num_key_heads = k_sGD.shape[1]
    width = num_key_heads if gather_heads is None else min(gather_heads, num_key_heads)
    overlap = overlap and gather_heads is not None and width > 1
    if overlap:
        width //= 2
    slices = [(g, min(g + width, num_key_heads)) for g in range(0, num_key_heads, width)]
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in (q_tHD, k_sGD, v_sGD))
    ratio = q_tHD.shape[1] // num_key_heads
    call = _Call(op, group, layout, seq, slices, ratio, picks, options, overlap, differentiate)
    return _AllGatherAttention.apply(call, q_tHD, k_sGD, v_sGD)


@dataclass(frozen=True)
class _Call:
    """What one call needs beside tensors. Slice i covers the key heads slices[i] and the query heads that use them."""

    op: Callable
    group: dist.ProcessGroup
    layout: Layout
    seq: SequenceInfo
    slices: list[tuple[int, int]]
    query_heads_per_key_head: int
    picks: Tensor | None
    options: dict[str, Any]
    overlap: bool
    differentiate: bool

    def key_heads(self, x: Tensor, i: int) -> Tensor:
        start, stop = self.slices[i]
        return x[:, start:stop]

    def query_heads(self, x: Tensor, i: int) -> Tensor:
        start, stop = self.slices[i]
        return x[:, start * self.query_heads_per_key_head : stop * self.query_heads_per_key_head]

    def attend(self, i: int, q_tHD: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> tuple[Tensor, Tensor]:
        picks = {} if self.picks is None else {"picks": self.query_heads(self.picks, i)}
        return self.op(q_tHD, k_SGD, v_SGD, self.seq, **picks, **self.options)

    def gather(self, i: int, k_sGD: Tensor, v_sGD: Tensor) -> Pending:
        return Pending.all([start_all_gather(self.key_heads(x, i), self.group) for x in (k_sGD, v_sGD)])

    def scatter(self, i: int, grads_SGD: list[Tensor], totals_sGD: list[Tensor]) -> Pending:
        """Sum slice i's gradients of K and V over ranks into this rank's rows of `totals_sGD`."""

        def write(summed_sGD: list[Tensor]) -> None:
            for total, own in zip(totals_sGD, summed_sGD, strict=True):
                copy_into(self.key_heads(total, i), own)

        return Pending.all([start_reduce_scatter(to_rank_order(x, self.layout), self.group) for x in grads_SGD]).then(
            write
        )


class _AllGatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, q_tHD: Tensor, k_sGD: Tensor, v_sGD: Tensor):
        graphs: list[Subgraph] = []
        saved: list[list[Tensor]] = []
        results: list[list[Tensor]] = []

        def attend(i: int, gathered: list[Tensor]) -> None:
            q, kv = call.query_heads(q_tHD, i), natural_order(gathered, call.layout)
            if call.differentiate:
                graph, outputs = record(partial(call.attend, i), [q], kv)
                graphs.append(graph)
                saved.append(graph.take_saved(outputs=False))
                results.append(outputs)
            else:
                results.append(list(call.attend(i, q, *kv)))

        pipelined(len(call.slices), lambda i: call.gather(i, k_sGD, v_sGD), attend, overlap=call.overlap)
        out_tHD, lse_tH = (_join_heads(parts) for parts in zip(*results, strict=True))
        ctx.call, ctx.graphs, ctx.num_saved = call, graphs, [len(x) for x in saved]
        ctx.set_materialize_grads(False)  # an op may do less for a gradient that is not there
        ctx.save_for_backward(k_sGD, v_sGD, out_tHD, lse_tH, *chain(*saved))
        return out_tHD, lse_tH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out_tHD: Tensor | None, grad_lse_tH: Tensor | None):
        call, graphs = ctx.call, take_graphs(ctx)
        k_sGD, v_sGD, out_tHD, lse_tH, *rest = ctx.saved_tensors
        saved = iter(rest)
        grads_q: list[Tensor] = []
        grads_kv = [torch.empty_like(k_sGD), torch.empty_like(v_sGD)]

        def differentiate(i: int, gathered: list[Tensor]) -> list[Tensor]:
            grads = [None if x is None else call.query_heads(x, i) for x in (grad_out_tHD, grad_lse_tH)]
            outputs = [call.query_heads(x, i) for x in (out_tHD, lse_tH)]
            kept = list(islice(saved, ctx.num_saved[i]))
            grad_q, *grads_SGD = graphs[i].gradients(grads, kept, natural_order(gathered, call.layout), outputs)
            grads_q.append(grad_q)
            return grads_SGD

        pipelined(
            len(call.slices),
            lambda i: call.gather(i, k_sGD, v_sGD),
            differentiate,
            lambda i, grads: call.scatter(i, grads, grads_kv),
            overlap=call.overlap,
        )
        return None, _join_heads(grads_q), *grads_kv


def _join_heads(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
