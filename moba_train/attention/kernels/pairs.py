"""The first pass of MoBA's forward: gathered queries against the earlier blocks that they picked.

One program takes a tile of one (key head, block) list, gathers its query rows and attends to the whole block. Where
the block fits one tile of keys it stays on chip while several tiles of queries pass by. The normalised result of a
pair goes to its place (row, slot) in a staging buffer, with its log2-sum-exp.

T query tokens, S held key rows, H query heads, G key heads, D head dim, N blocks, K picks.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_train.attention.kernels.routing import launch_tile_map, route
from moba_train.attention.kernels.tiles import forward_tiles, key_argument, padded_dim, uses_tma

__all__ = ["LOG2E", "absorb", "attend_pairs", "load_keys"]

LOG2E = math.log2(math.e)
_RESIDENT_TILES = 8


def attend_pairs(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    picks_THK: Tensor,
    key_start_N: Tensor,
    key_end_N: Tensor,
    block_size: int,
    granularity: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Results [T * H * (K - 1), D] of every (row, slot) and their log2-sum-exp, -inf where a slot has no pick.

    Keys of block n are held rows key_start_N[n] .. key_end_N[n]; `granularity` divides the length of every block.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    num_blocks, num_kv_heads, top_k = key_start_N.shape[0], k_SGD.shape[1], picks_THK.shape[2]
    num_pairs = num_tokens * num_heads * (top_k - 1)
    staged = torch.empty(num_pairs, head_dim, dtype=q_THD.dtype, device=q_THD.device)
    # A slot without a pick keeps -inf and weighs nothing.
    staged_lse = torch.full((num_pairs,), -torch.inf, dtype=torch.float32, device=q_THD.device)
    if num_pairs == 0:
        return staged, staged_lse
    lists = route(picks_THK, num_kv_heads, num_blocks)
    tiles = forward_tiles(q_THD.dtype, head_dim, block_size, num_tokens * num_heads // num_kv_heads)
    # A block that fits one tile stays on chip while several tiles of queries pass by.
    resident = _RESIDENT_TILES if tiles.cols >= block_size else 1
    rows = tiles.rows * resident
    tile_map = launch_tile_map(lists.starts, lists.ends, lists.stride, lists.num_lists, num_pairs, rows)
    tma = uses_tma(k_SGD, v_SGD)
    kernel = _resident_pairs_kernel if resident > 1 else _pairs_kernel
    kernel[tile_map.shape](
        q_THD,
        key_argument(k_SGD, tiles.cols, tma),
        key_argument(v_SGD, tiles.cols, tma),
        staged,
        staged_lse,
        lists.pairs,
        lists.starts,
        lists.ends,
        tile_map,
        key_start_N,
        key_end_N,
        scale * LOG2E,
        lists.stride,
        num_blocks,
        q_THD.stride(0),
        q_THD.stride(1),
        k_SGD.stride(0),
        k_SGD.stride(1),
        v_SGD.stride(0),
        v_SGD.stride(1),
        H=num_heads,
        K=top_k,
        D=head_dim,
        DP=padded_dim(head_dim),
        BM=tiles.rows,
        BN=tiles.cols,
        EVEN=granularity % tiles.cols == 0,
        ROWS=rows,
        TMA=tma,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return staged, staged_lse


@triton.jit
def load_keys(
    x, row, end, g, stride_s, stride_g, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr
):
    # [BN, DP]; rows past `end` are zero through pointers, and other blocks' rows through a descriptor.
    if TMA:
        return x.load([row, g * D])
    else:
        rows = row + tl.arange(0, BN)
        dim = tl.arange(0, DP)
        at = rows.to(tl.int64)[:, None] * stride_s + g.to(tl.int64) * stride_g + dim[None, :]
        return tl.load(x + at, mask=(rows < end)[:, None] & (dim < D)[None, :], other=0.0)


@triton.jit
def absorb(q, k, v, highest, total, acc, qk_scale, allowed, MASKED: tl.constexpr):
    # One step of online softmax in base 2.
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(allowed, scores, float("-inf"))
    now = tl.maximum(highest, tl.max(scores, axis=1) * qk_scale)
    # A row that has seen no key yet keeps -inf; it must not become inf - inf.
    shift = tl.where(now == float("-inf"), 0.0, now) if MASKED else now
    weights = tl.exp2(scores * qk_scale - shift[:, None])
    fade = tl.exp2(highest - shift)
    total = total * fade + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return now, total, acc


@triton.jit
def _pairs_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    staged_ptr,
    staged_lse_ptr,
    pairs_ptr,
    starts_ptr,
    ends_ptr,
    map_ptr,
    key_start_ptr,
    key_end_ptr,
    qk_scale,
    list_stride,
    num_blocks,
    stride_qt,
    stride_qh,
    stride_ks,
    stride_kg,
    stride_vs,
    stride_vg,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
):
    tile = tl.program_id(0)
    entry = tl.load(map_ptr + tile)
    if entry < 0:
        return
    start = tl.load(starts_ptr + entry.to(tl.int64) * list_stride)
    end = tl.load(ends_ptr + entry.to(tl.int64) * list_stride)
    place = start + (tile - start // BM - entry) * BM + tl.arange(0, BM)
    live = place < end
    pair = tl.load(pairs_ptr + place, mask=live, other=0)
    row = pair // K
    g = entry // num_blocks
    block = entry % num_blocks
    key = tl.load(key_start_ptr + block).to(tl.int32)
    key_end = tl.load(key_end_ptr + block).to(tl.int32)

    dim = tl.arange(0, DP)
    at = (row // H).to(tl.int64)[:, None] * stride_qt + (row % H).to(tl.int64)[:, None] * stride_qh + dim[None, :]
    q = tl.load(q_ptr + at, mask=live[:, None] & (dim < D)[None, :], other=0.0)
    highest = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    acc = tl.zeros([BM, DP], dtype=tl.float32)
    for n in range(key, key_end, BN):
        k = load_keys(k_ptr, n, key_end, g, stride_ks, stride_kg, D, DP, BN, TMA)
        v = load_keys(v_ptr, n, key_end, g, stride_vs, stride_vg, D, DP, BN, TMA)
        allowed = (n + tl.arange(0, BN) < key_end)[None, :]
        highest, total, acc = absorb(q, k, v, highest, total, acc, qk_scale, allowed, not EVEN)

    # A block without held keys leaves total 0: its lse stays -inf, its result 0.
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    spot = row.to(tl.int64) * (K - 1) + pair % K - 1
    tl.store(staged_lse_ptr + spot, highest + tl.log2(total), mask=live)
    tl.store(
        staged_ptr + spot[:, None] * D + dim[None, :],
        out.to(staged_ptr.dtype.element_ty),
        mask=live[:, None] & (dim < D)[None, :],
    )


@triton.jit
def _resident_pairs_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    staged_ptr,
    staged_lse_ptr,
    pairs_ptr,
    starts_ptr,
    ends_ptr,
    map_ptr,
    key_start_ptr,
    key_end_ptr,
    qk_scale,
    list_stride,
    num_blocks,
    stride_qt,
    stride_qh,
    stride_ks,
    stride_kg,
    stride_vs,
    stride_vg,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
):
    chunk = tl.program_id(0)
    entry = tl.load(map_ptr + chunk)
    if entry < 0:
        return
    start = tl.load(starts_ptr + entry.to(tl.int64) * list_stride)
    first = start + (chunk - start // ROWS - entry) * ROWS
    end = tl.minimum(tl.load(ends_ptr + entry.to(tl.int64) * list_stride), first + ROWS)
    g = entry // num_blocks
    key = tl.load(key_start_ptr + entry % num_blocks).to(tl.int32)
    key_end = tl.load(key_end_ptr + entry % num_blocks).to(tl.int32)
    k = load_keys(k_ptr, key, key_end, g, stride_ks, stride_kg, D, DP, BN, TMA)
    v = load_keys(v_ptr, key, key_end, g, stride_vs, stride_vg, D, DP, BN, TMA)
    allowed = (key + tl.arange(0, BN) < key_end)[None, :]
    dim = tl.arange(0, DP)
    # Pairs are read one tile ahead: gathers whose addresses wait for a load could not be prefetched.
    pair = tl.load(pairs_ptr + first + tl.arange(0, BM), mask=first + tl.arange(0, BM) < end, other=0)
    for place in range(first, end, BM):
        live = place + tl.arange(0, BM) < end
        ahead = place + BM + tl.arange(0, BM)
        upcoming = tl.load(pairs_ptr + ahead, mask=ahead < end, other=0)
        row = pair // K
        inside = live[:, None] & (dim < D)[None, :]
        at = (row // H).to(tl.int64)[:, None] * stride_qt + (row % H).to(tl.int64)[:, None] * stride_qh + dim[None, :]
        scores = tl.dot(tl.load(q_ptr + at, mask=inside, other=0.0), tl.trans(k), input_precision="ieee")
        if not EVEN:
            scores = tl.where(allowed, scores, float("-inf"))
        highest = tl.max(scores, axis=1) * qk_scale
        # A block without held keys: its lse stays -inf, its result 0.
        shift = highest if EVEN else tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores * qk_scale - shift[:, None])
        total = tl.sum(weights, axis=1)
        out = tl.dot(weights.to(v.dtype), v, input_precision="ieee") / tl.where(total == 0.0, 1.0, total)[:, None]
        spot = row.to(tl.int64) * (K - 1) + pair % K - 1
        tl.store(staged_lse_ptr + spot, highest + tl.log2(total), mask=live)
        tl.store(staged_ptr + spot[:, None] * D + dim[None, :], out.to(staged_ptr.dtype.element_ty), mask=inside)
        pair = upcoming
