"""From picks to the list of queries of each (key head, block): a counting sort on the device, without a host sync.

A pair is one query row (token t, head h) and one of its earlier picks; its id is its flat index in picks_THK, so
`id // K` is the row and `id % K` the slot. Lists are ordered by key head, then block; inside a list pairs are grouped
into segments (span of tokens, head of the group). `deterministic` also fixes the order inside a segment.

T query tokens, H query heads, G key heads, N blocks, K picks, L = G * N lists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_train.attention.kernels.tiles import ceil_div, power_of_two

__all__ = ["PairLists", "head_groups", "launch_tile_map", "route"]

_FEW_SEGMENTS, _MANY_SEGMENTS = 1 << 21, 1 << 26
_MOST_IDS = 2**31  # a pair's id is an int32


class PairLists(NamedTuple):
    """List l holds pairs[starts[l * stride] : ends[l * stride]]; `places` is the inverse where asked for."""

    pairs: Tensor
    starts: Tensor
    ends: Tensor
    stride: int
    num_lists: int
    places: Tensor | None = None  # [T * H * (K - 1)]: where each (row, slot) is in `pairs`, -1 for no pick


def head_groups(picks_THK: Tensor, num_kv_heads: int, most: int | None = None) -> list[slice]:
    """Key heads in groups of about one size, of at most `most`, whose pairs can be told apart.

    Raises ValueError where those of a single key head cannot.
    """
    num_tokens, num_heads, top_k = picks_THK.shape
    ids = num_tokens * (num_heads // num_kv_heads) * top_k  # of a key head
    if ids >= _MOST_IDS:
        raise ValueError(
            f"{num_tokens} queries of {num_heads // num_kv_heads} heads a key head, times top_k={top_k}, are more "
            "pairs than 32 bits count: share the context among more ranks, or take a smaller top_k"
        )
    count = min(num_kv_heads, num_kv_heads if most is None else max(1, most), (_MOST_IDS - 1) // max(1, ids))
    count = ceil_div(num_kv_heads, ceil_div(num_kv_heads, count))
    return [slice(g, min(g + count, num_kv_heads)) for g in range(0, num_kv_heads, count)]


def route(
    picks_THK: Tensor, num_kv_heads: int, num_blocks: int, *, deterministic: bool = False, places: bool = False
) -> PairLists:
    """Sort the picks of slots 1 .. K - 1 (slot 0 is the own block; -1 is no pick) by (key head, block)."""
    num_tokens, num_heads, top_k = picks_THK.shape
    ratio = num_heads // num_kv_heads
    num_lists = num_kv_heads * num_blocks
    # Short spans keep programs off each other's counters; the counters must stay few against the pairs.
    span = 4096
    while span > 256 and num_heads * num_blocks * ceil_div(num_tokens, span) < _FEW_SEGMENTS:
        span //= 2
    while num_heads * num_blocks * ceil_div(num_tokens, span) > _MANY_SEGMENTS and span < num_tokens:
        span *= 2
    num_spans = ceil_div(num_tokens, span)
    stride = num_spans * ratio
    # Segment s is counted in place 1 + s, so the running sum holds its start in place s and its end in place 1 + s.
    counts = torch.zeros(num_lists * stride + 1, dtype=torch.int32, device=picks_THK.device)
    pairs = torch.empty(num_tokens * num_heads * (top_k - 1), dtype=torch.int32, device=picks_THK.device)
    ranks = torch.empty_like(pairs)
    bounds = counts
    for scatter in (False, True):
        # One query's picks are distinct, so counting query by query leaves nothing to the order of atomics.
        per_program, per_step = (span, 1) if deterministic and not scatter else (128, 128)
        if scatter:
            bounds = torch.cumsum(counts, dim=0, dtype=torch.int32)
        _route_kernel[(ceil_div(num_tokens, per_program), num_heads)](
            picks_THK,
            bounds,
            ranks,
            pairs,
            num_tokens,
            num_blocks,
            num_spans,
            picks_THK.stride(0),
            picks_THK.stride(1),
            H=num_heads,
            RATIO=ratio,
            K=top_k,
            KP=power_of_two(top_k - 1),
            SPAN=span,
            PER_PROGRAM=per_program,
            PER_STEP=per_step,
            SCATTER=scatter,
            PLACES=places,
            num_warps=1 if per_step == 1 else 4,
        )
    return PairLists(pairs, bounds, bounds[stride:], stride, num_lists, ranks if places else None)


def launch_tile_map(
    starts: Tensor, ends: Tensor, stride: int, num_lists: int, max_rows: int, rows_per_tile: int
) -> Tensor:
    """int32: the list that each tile of `rows_per_tile` rows works on, or -1 for a tile without work.

    List l's tiles begin at `start // rows_per_tile + l`, which leaves room for each list's rounding up: no scan over
    the lists is needed, and a tile finds its rows from its number and the list's bounds alone.
    """
    num_tiles = max_rows // rows_per_tile + num_lists
    tiles = torch.empty(num_tiles, dtype=torch.int32, device=starts.device)
    _tile_map_kernel[(num_lists,)](
        starts, ends, tiles, stride, num_lists, num_tiles, ROWS=rows_per_tile, WIDTH=256, num_warps=1
    )
    return tiles


@triton.jit
def _route_kernel(
    picks_ptr,
    bounds_ptr,
    ranks_ptr,
    pairs_ptr,
    num_tokens,
    num_blocks,
    num_spans,
    stride_pt,
    stride_ph,
    H: tl.constexpr,
    RATIO: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SPAN: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    PER_STEP: tl.constexpr,
    SCATTER: tl.constexpr,
    PLACES: tl.constexpr,
):
    h = tl.program_id(1)
    slot = 1 + tl.arange(0, KP)
    first = tl.program_id(0) * PER_PROGRAM
    for start in range(first, min(first + PER_PROGRAM, num_tokens), PER_STEP):
        t = start + tl.arange(0, PER_STEP)
        there = (t < num_tokens)[:, None] & (slot < K)[None, :]
        at = t.to(tl.int64)[:, None] * stride_pt + h * stride_ph + slot[None, :]
        block = tl.load(picks_ptr + at, mask=there, other=-1)
        live = there & (block >= 0)
        segment = (((h // RATIO) * num_blocks + block) * num_spans + (t // SPAN)[:, None]) * RATIO + h % RATIO
        rank_at = ranks_ptr + (t.to(tl.int64)[:, None] * H + h) * (K - 1) + slot[None, :] - 1
        if SCATTER:
            place = tl.load(bounds_ptr + segment, mask=live) + tl.load(rank_at, mask=live)
            tl.store(pairs_ptr + place, (t[:, None] * H + h) * K + slot[None, :], mask=live)
            if PLACES:
                tl.store(rank_at, tl.where(live, place, -1), mask=there)
        else:
            rank = tl.atomic_add(bounds_ptr + 1 + segment, 1, mask=live, sem="relaxed")
            tl.store(rank_at, rank, mask=live)
            if PER_STEP == 1:
                tl.debug_barrier()


@triton.jit
def _tile_map_kernel(
    starts_ptr, ends_ptr, tiles_ptr, stride, num_lists, num_tiles, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    entry = tl.program_id(0)
    start = tl.load(starts_ptr + entry.to(tl.int64) * stride).to(tl.int32)
    end = tl.load(ends_ptr + entry.to(tl.int64) * stride).to(tl.int32)
    first = start // ROWS + entry
    used = first + (end - start + ROWS - 1) // ROWS
    last = end // ROWS + entry + 1
    if entry == num_lists - 1:
        last = num_tiles
    for tile in range(first, last, WIDTH):
        tiles = tile + tl.arange(0, WIDTH)
        tl.store(tiles_ptr + tiles, tl.where(tiles < used, entry, -1), mask=tiles < last)
