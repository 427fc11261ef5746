"""Make an attention op context-parallel without changing its signature.

The wrapped op takes this rank's rows of q, k and v, and a `SequenceInfo` with the global document bounds and
`q_positions = layout.positions(rank)`; it returns this rank's rows of the output. One wrapped op serves any length:
the layout is a rule that is asked anew for each.

Letters: `t` rows of this rank (queries and keys alike), `H` query heads, `G` key heads, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.attention import SequenceInfo
from moba_train.context_parallel.all_gather import attend_all_gather
from moba_train.context_parallel.all_to_all import attend_all_to_all
from moba_train.context_parallel.layout import Layout, LayoutRule, zigzag
from moba_train.context_parallel.ring import attend_ring, route
from moba_train.context_parallel.rows import layout_of, row_numbers, with_rows

__all__ = ["STRATEGIES", "wrap"]

STRATEGIES = ("all_gather", "all_to_all", "ring")


def wrap(
    op: Callable,
    group: dist.ProcessGroup | None,
    strategy: str = "all_gather",
    *,
    layout: LayoutRule = zigzag,
    gather_heads: int | None = None,
    overlap: bool = True,
    inner_group: dist.ProcessGroup | None = None,
) -> Callable:
    """`op` (full_attention or moba_attention) over the context shared by the ranks of `group`.

    Block size, top-k and the gate's other options are given to each call: `ring` routes by them before the op runs.

    Args:
        strategy: "all_gather", "all_to_all" or "ring".
        layout: the rule that says which rows each rank holds: zigzag, contiguous or balanced.
        gather_heads: how many key heads of the whole context may be alive at once under all_gather; None: all.
        overlap: communicate under the attention where there is more than one piece to attend to.
        inner_group: hierarchical: all_to_all among the ranks of `inner_group` (neighbours: context ranks that follow
            each other), `strategy` across `group` (one rank of each inner group). The context is shared by all of them.

    A context of one rank gives `op` itself. Raises ValueError for settings that cannot work.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"context strategy {strategy!r} is not one of {', '.join(STRATEGIES)}")
    if gather_heads is not None and gather_heads < 1:
        raise ValueError(f"gather_heads = {gather_heads}: give a number of key heads of at least 1, or none for all")
    if strategy == "all_to_all":
        if inner_group is not None and inner_group.size() > 1:
            raise ValueError("all_to_all inside and across is one all_to_all: drop inner_group or cross by ring")
        group, inner_group = None, group
    group, inner_group = (None if x is None or x.size() == 1 else x for x in (group, inner_group))
    outer_size, outer_rank = _size_and_rank(group)
    inner_size, inner_rank = _size_and_rank(inner_group)
    rank, num_ranks = outer_rank * inner_size + inner_rank, outer_size * inner_size
    if num_ranks == 1:
        return op

    def context_parallel_op(
        q_tHD: Tensor, k_tGD: Tensor, v_tGD: Tensor, seq: SequenceInfo, **options: Any
    ) -> tuple[Tensor, Tensor]:
        rows = layout_of(seq, layout, num_ranks)
        _check(q_tHD, k_tGD, v_tGD, seq, rows, rank)
        across, attend = rows.across(inner_size), op
        if group is not None and strategy == "all_gather":
            attend = partial(attend_all_gather, op, group, across, overlap=overlap, gather_heads=gather_heads)
        elif group is not None:
            attend = partial(attend_ring, op, group, across, overlap=overlap)
        if inner_group is not None:
            if options.get("share_picks_in_group") and options.get("picks") is None and k_tGD.shape[1] < inner_size:
                # A key head's queries are dealt to several ranks, none of which could sum their scores.
                own_rows = with_rows(seq, queries=rows.chunks[rank], keys=rows.chunks[rank])
                groups = [x for x in (inner_group, group) if x is not None]
                options["picks"] = route(q_tHD, k_tGD, own_rows, groups, options)
            seq = with_rows(seq, queries=None if group is None else across.chunks[outer_rank], keys=None)
            inside = rows.inside(inner_size, outer_rank)
            # Without overlap too, where rows travel across: one key head at a time bounds what is there of them.
            one_by_one = overlap or group is not None
            attend = partial(attend_all_to_all, attend, inner_group, inside, overlap=overlap, one_by_one=one_by_one)
        return attend(q_tHD, k_tGD, v_tGD, seq, **options)

    return context_parallel_op


def _size_and_rank(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (1, 0) if group is None else (group.size(), group.rank())


def _check(q_tHD: Tensor, k_tGD: Tensor, v_tGD: Tensor, seq: SequenceInfo, rows: Layout, rank: int) -> None:
    for name, x in (("q", q_tHD), ("k", k_tGD), ("v", v_tGD)):
        if x.shape[0] != rows.rows_per_rank:
            raise ValueError(
                f"{name} has {x.shape[0]} rows, but each of {rows.num_ranks} context ranks holds {rows.rows_per_rank} "
                f"of {rows.length}"
            )
    if q_tHD.shape[1] % k_tGD.shape[1]:
        raise ValueError(f"{q_tHD.shape[1]} query heads are not divisible by {k_tGD.shape[1]} key heads")
    if seq.k_positions is not None:
        raise ValueError("k_positions are the wrapper's own business: pass the sequence of the whole context without")
    if seq.q_positions is None or not torch.equal(seq.q_positions, row_numbers(rows.chunks[rank])):
        raise ValueError(f"q_positions are not the rows of context rank {rank}; use layout.positions({rank})")
