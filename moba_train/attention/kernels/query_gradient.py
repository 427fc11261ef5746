"""dQ without atomics: each (query, block) pair's share is staged, then summed in the order of the slots.

The same two passes as the forward (forward.py), so the result is bitwise the same from run to run. It recomputes the
scores, which the atomic path does not.

T query tokens, S held key rows, H query heads, G key heads, D head dim, N blocks, K picks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_train.attention.kernels.forward import slices
from moba_train.attention.kernels.pairs import LOG2E, load_keys
from moba_train.attention.kernels.routing import launch_tile_map, route
from moba_train.attention.kernels.tiles import key_argument, own_tiles, padded_dim, query_tiles, uses_tma

__all__ = ["launch_query_gradient"]


def launch_query_gradient(
    dout_THD: Tensor,
    lse2_TH: Tensor,
    delta_TH: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    picks_THK: Tensor,
    key_start_N: Tensor,
    key_end_N: Tensor,
    query_start_N: Tensor,
    query_end_N: Tensor,
    limit_T: Tensor,
    block_size: int,
    granularity: int,
    scale: float,
) -> Tensor:
    """dq in q's dtype, from the rows' log2-sum-exp and delta. Other arguments as in `launch_forward`."""
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads, num_blocks, top_k = k_SGD.shape[1], key_start_N.shape[0], picks_THK.shape[2]
    ratio = num_heads // num_kv_heads
    dq_THD = torch.empty(num_tokens, num_heads, head_dim, dtype=q_THD.dtype, device=q_THD.device)
    own = own_tiles(q_THD.dtype, head_dim, block_size, num_tokens)
    tiles = query_tiles(q_THD.dtype, head_dim, block_size, num_tokens * ratio)
    own_map = launch_tile_map(query_start_N, query_end_N, 1, num_blocks, num_tokens, own.rows)
    for group in slices(q_THD, picks_THK, num_kv_heads):
        heads = slice(group.start * ratio, group.stop * ratio)
        q, k, v, picks, dout = (
            q_THD[:, heads],
            k_SGD[:, group],
            v_SGD[:, group],
            picks_THK[:, heads],
            dout_THD[:, heads],
        )
        tma = uses_tma(k, v)
        num_pairs = num_tokens * q.shape[1] * (top_k - 1)
        staged = torch.empty(num_pairs, head_dim, dtype=q.dtype, device=q.device)
        strides = [*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2]]
        shape = {"H": q.shape[1], "K": top_k, "D": head_dim, "DP": padded_dim(head_dim), "TMA": tma}
        rows = (lse2_TH[:, heads], delta_TH[:, heads])
        if num_pairs:
            lists = route(picks, k.shape[1], num_blocks)
            tile_map = launch_tile_map(lists.starts, lists.ends, lists.stride, lists.num_lists, num_pairs, tiles.rows)
            _pairs_kernel[tile_map.shape](
                q,
                key_argument(k, tiles.cols, tma),
                key_argument(v, tiles.cols, tma),
                dout,
                *rows,
                staged,
                lists.pairs,
                lists.starts,
                lists.ends,
                tile_map,
                key_start_N,
                key_end_N,
                scale,
                scale * LOG2E,
                lists.stride,
                num_blocks,
                num_heads,
                *strides,
                **shape,
                BM=tiles.rows,
                BN=tiles.cols,
                EVEN=granularity % tiles.cols == 0,
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )
        _own_kernel[(own_map.shape[0], q.shape[1])](
            q,
            key_argument(k, own.cols, tma),
            key_argument(v, own.cols, tma),
            dout,
            *rows,
            picks,
            staged,
            dq_THD[:, heads],
            own_map,
            key_start_N,
            key_end_N,
            query_start_N,
            query_end_N,
            limit_T,
            scale,
            scale * LOG2E,
            num_heads,
            *strides,
            picks.stride(0),
            picks.stride(1),
            **shape,
            RATIO=ratio,
            BM=own.rows,
            BN=own.cols,
            num_warps=own.warps,
            num_stages=own.stages,
        )
        del staged  # before the next group's is allocated
    return dq_THD


@triton.jit
def _absorb(q, k, v, dout, lse2, delta, dq, qk_scale, allowed, MASKED: tl.constexpr):
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    weights = tl.exp2(scores * qk_scale - lse2[:, None])
    if MASKED:
        weights = tl.where(allowed, weights, 0.0)
    dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
    dscores = weights * (dweights - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _pairs_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    staged_ptr,
    pairs_ptr,
    starts_ptr,
    ends_ptr,
    map_ptr,
    key_start_ptr,
    key_end_ptr,
    scale,
    qk_scale,
    list_stride,
    num_blocks,
    all_heads,
    stride_qt,
    stride_qh,
    stride_ks,
    stride_kg,
    stride_vs,
    stride_vg,
    stride_ot,
    stride_oh,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
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
    inside = live[:, None] & (dim < D)[None, :]
    t = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    q = tl.load(q_ptr + t[:, None] * stride_qt + h[:, None] * stride_qh + dim[None, :], mask=inside, other=0.0)
    dout = tl.load(dout_ptr + t[:, None] * stride_ot + h[:, None] * stride_oh + dim[None, :], mask=inside, other=0.0)
    lse2 = tl.load(lse2_ptr + t * all_heads + h, mask=live, other=float("inf"))
    delta = tl.load(delta_ptr + t * all_heads + h, mask=live, other=0.0)
    dq = tl.zeros([BM, DP], dtype=tl.float32)
    for n in range(key, key_end, BN):
        k = load_keys(k_ptr, n, key_end, g, stride_ks, stride_kg, D, DP, BN, TMA)
        v = load_keys(v_ptr, n, key_end, g, stride_vs, stride_vg, D, DP, BN, TMA)
        allowed = (n + tl.arange(0, BN) < key_end)[None, :]
        dq = _absorb(q, k, v, dout, lse2, delta, dq, qk_scale, allowed, not EVEN)

    spot = row.to(tl.int64) * (K - 1) + pair % K - 1
    tl.store(staged_ptr + spot[:, None] * D + dim[None, :], (dq * scale).to(staged_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _own_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    picks_ptr,
    staged_ptr,
    dq_ptr,
    map_ptr,
    key_start_ptr,
    key_end_ptr,
    query_start_ptr,
    query_end_ptr,
    limit_ptr,
    scale,
    qk_scale,
    all_heads,
    stride_qt,
    stride_qh,
    stride_ks,
    stride_kg,
    stride_vs,
    stride_vg,
    stride_ot,
    stride_oh,
    stride_pt,
    stride_ph,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TMA: tl.constexpr,
    RATIO: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tile = tl.program_id(0)
    block = tl.load(map_ptr + tile)
    if block < 0:
        return
    h = tl.program_id(1)
    wide_h = h.to(tl.int64)
    g = h // RATIO
    start = tl.load(query_start_ptr + block).to(tl.int32)
    end = tl.load(query_end_ptr + block).to(tl.int32)
    t = start + (tile - start // BM - block) * BM + tl.arange(0, BM)
    live = t < end
    wide = t.to(tl.int64)
    row = wide * all_heads + h
    dim = tl.arange(0, DP)
    inside = live[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + wide[:, None] * stride_qt + wide_h * stride_qh + dim[None, :], mask=inside, other=0.0)
    dout = tl.load(dout_ptr + wide[:, None] * stride_ot + wide_h * stride_oh + dim[None, :], mask=inside, other=0.0)
    lse2 = tl.load(lse2_ptr + row, mask=live, other=float("inf"))
    delta = tl.load(delta_ptr + row, mask=live, other=0.0)
    key = tl.load(key_start_ptr + block).to(tl.int32)
    key_end = tl.load(key_end_ptr + block).to(tl.int32)
    limit = tl.load(limit_ptr + t, mask=live, other=0).to(tl.int32)
    key_end = tl.minimum(key_end, tl.max(limit, axis=0))

    dq = tl.zeros([BM, DP], dtype=tl.float32)
    for n in range(key, key_end, BN):
        k = load_keys(k_ptr, n, key_end, g, stride_ks, stride_kg, D, DP, BN, TMA)
        v = load_keys(v_ptr, n, key_end, g, stride_vs, stride_vg, D, DP, BN, TMA)
        allowed = (n + tl.arange(0, BN))[None, :] < tl.minimum(limit, key_end)[:, None]
        dq = _absorb(q, k, v, dout, lse2, delta, dq, qk_scale, allowed, True)
    dq *= scale
    for slot in range(1, K):
        pick = tl.load(picks_ptr + wide * stride_pt + wide_h * stride_ph + slot, mask=live, other=-1)
        spot = (wide * H + h) * (K - 1) + slot - 1
        there = (pick >= 0)[:, None] & (dim < D)[None, :]
        dq += tl.load(staged_ptr + spot[:, None] * D + dim[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(dq_ptr + row[:, None] * D + dim[None, :], dq.to(dq_ptr.dtype.element_ty), mask=inside)
