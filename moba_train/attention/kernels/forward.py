"""MoBA forward: gathered queries against earlier blocks, the own block, and the merge of their results.

1. pairs.py stages the result of every (query, earlier block) pair.
2. One program takes a tile of queries of one own block and one head, and attends to the own block, causally.
3. gather.py merges the staged results in, row by row. That needs few registers, so more loads are under way than where
   the second step does it too (benchmarks/LOG.md, entry 11).

Staging is bounded by working on a few key heads at a time. All sizes come from shapes: nothing waits for the device.

T query tokens, S held key rows, H query heads, G key heads, D head dim, N blocks, K picks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_train.attention.kernels.gather import merge_parts
from moba_train.attention.kernels.pairs import LOG2E, absorb, attend_pairs, load_keys
from moba_train.attention.kernels.routing import head_groups, launch_tile_map
from moba_train.attention.kernels.tiles import key_argument, own_tiles, padded_dim, uses_tma

__all__ = ["launch_forward", "slices"]

# Staged results at a time, in multiples of q's bytes, so that the forward needs less than any backward.
_STAGING = 3.0
_STAGING_FLOOR = 256 * 2**20


def launch_forward(
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
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and natural-log lse [T, H] (fp32) of attention to the picked blocks.

    Keys of block n are held rows key_start_N[n] .. key_end_N[n], its queries rows query_start_N[n] .. query_end_N[n];
    query t sees held rows before limit_T[t]. `granularity` divides the length of every block.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_SGD.shape[1]
    ratio = num_heads // num_kv_heads
    num_blocks = key_start_N.shape[0]
    out_THD = torch.empty(num_tokens, num_heads, head_dim, dtype=q_THD.dtype, device=q_THD.device)
    lse_TH = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q_THD.device)
    if out_THD.numel() == 0:
        return out_THD, lse_TH
    own = own_tiles(q_THD.dtype, head_dim, block_size, num_tokens)
    own_map = launch_tile_map(query_start_N, query_end_N, 1, num_blocks, num_tokens, own.rows)
    for group in slices(q_THD, picks_THK, num_kv_heads):
        heads = slice(group.start * ratio, group.stop * ratio)
        q, k, v, picks = q_THD[:, heads], k_SGD[:, group], v_SGD[:, group], picks_THK[:, heads]
        staged, staged_lse = attend_pairs(q, k, v, picks, key_start_N, key_end_N, block_size, granularity, scale)
        tma = uses_tma(k, v)
        _own_kernel[(own_map.shape[0], q.shape[1])](
            q,
            key_argument(k, own.cols, tma),
            key_argument(v, own.cols, tma),
            out_THD[:, heads],
            lse_TH[:, heads],
            own_map,
            key_start_N,
            key_end_N,
            query_start_N,
            query_end_N,
            limit_T,
            scale * LOG2E,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            num_heads,
            RATIO=ratio,
            D=head_dim,
            DP=padded_dim(head_dim),
            BM=own.rows,
            BN=own.cols,
            TMA=tma,
            num_warps=own.warps,
            num_stages=own.stages,
        )
        if picks.shape[2] > 1:
            merge_parts(out_THD[:, heads], lse_TH[:, heads], staged, staged_lse, None)
        del staged, staged_lse  # before the next group's are allocated
    return out_THD, lse_TH


def slices(q_THD: Tensor, picks_THK: Tensor, num_kv_heads: int) -> list[slice]:
    """Groups of key heads whose staged results fit the budget, and whose pairs can be told apart."""
    num_tokens, num_heads, head_dim = q_THD.shape
    top_k = picks_THK.shape[2]
    ratio = num_heads // num_kv_heads
    budget = max(_STAGING_FLOOR, _STAGING * q_THD.numel() * q_THD.element_size())
    per_group = num_tokens * ratio * (top_k - 1) * (head_dim * q_THD.element_size() + 4)
    return head_groups(picks_THK, num_kv_heads, int(budget // max(1, per_group)))


@triton.jit
def _own_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    map_ptr,
    key_start_ptr,
    key_end_ptr,
    query_start_ptr,
    query_end_ptr,
    limit_ptr,
    qk_scale,
    stride_qt,
    stride_qh,
    stride_ks,
    stride_kg,
    stride_vs,
    stride_vg,
    all_heads,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
):
    tile = tl.program_id(0)
    block = tl.load(map_ptr + tile)
    if block < 0:
        return
    h = tl.program_id(1)
    g = h // RATIO
    start = tl.load(query_start_ptr + block).to(tl.int32)
    end = tl.load(query_end_ptr + block).to(tl.int32)
    first = start + (tile - start // BM - block) * BM
    t = first + tl.arange(0, BM)
    live = t < end
    wide = t.to(tl.int64)
    dim = tl.arange(0, DP)
    inside = live[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + wide[:, None] * stride_qt + h.to(tl.int64) * stride_qh + dim[None, :], mask=inside, other=0.0)
    key = tl.load(key_start_ptr + block).to(tl.int32)
    key_end = tl.load(key_end_ptr + block).to(tl.int32)
    limit = tl.load(limit_ptr + t, mask=live, other=0).to(tl.int32)
    # Limits grow with the query: the first bounds what all rows see, the last what any row sees.
    key_end = tl.minimum(key_end, tl.max(limit, axis=0))
    shared = tl.minimum(key_end, tl.load(limit_ptr + first).to(tl.int32))
    whole = key + tl.maximum(shared - key, 0) // BN * BN

    highest = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    acc = tl.zeros([BM, DP], dtype=tl.float32)
    for n in range(key, whole, BN):
        k = load_keys(k_ptr, n, key_end, g, stride_ks, stride_kg, D, DP, BN, TMA)
        v = load_keys(v_ptr, n, key_end, g, stride_vs, stride_vg, D, DP, BN, TMA)
        highest, total, acc = absorb(q, k, v, highest, total, acc, qk_scale, True, False)
    for n in range(whole, key_end, BN):
        k = load_keys(k_ptr, n, key_end, g, stride_ks, stride_kg, D, DP, BN, TMA)
        v = load_keys(v_ptr, n, key_end, g, stride_vs, stride_vg, D, DP, BN, TMA)
        allowed = (n + tl.arange(0, BN))[None, :] < tl.minimum(limit, key_end)[:, None]
        highest, total, acc = absorb(q, k, v, highest, total, acc, qk_scale, allowed, True)

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    row = wide * all_heads + h
    tl.store(lse_ptr + row, (highest + tl.log2(total)) * 0.6931471805599453, mask=live)
    tl.store(out_ptr + row[:, None] * D + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
