"""MoBA backward: a program owns a tile of keys and visits every query that sees it.

It keeps dK and dV of its keys in registers over the queries of its own block (causal) and the list of queries that
picked the block, all heads of the group alike, so no sum over heads or lists remains. dQ is added up with fp32 atomics,
or, when `deterministic`, by a second pass in the order of the queries (query_gradient.py).

With P = softmax and lse differentiable: dS = P * (dO V^T - delta), delta = rowsum(dO * O) - dlse.

T query tokens, S held key rows, H query heads, G key heads, D head dim, N blocks, K picks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_train.attention.kernels.pairs import LOG2E
from moba_train.attention.kernels.query_gradient import launch_query_gradient
from moba_train.attention.kernels.routing import PairLists, head_groups, route
from moba_train.attention.kernels.tiles import backward_tiles, ceil_div, padded_dim

__all__ = ["launch_backward"]


def launch_backward(
    dout_THD: Tensor,
    dlse_TH: Tensor | None,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    out_THD: Tensor,
    lse_TH: Tensor,
    picks_THK: Tensor,
    key_start_N: Tensor,
    key_end_N: Tensor,
    query_start_N: Tensor,
    query_end_N: Tensor,
    limit_T: Tensor,
    block_size: int,
    granularity: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the inputs' dtype. Arguments as in `launch_forward`."""
    num_tokens, num_heads, head_dim = q_THD.shape
    num_keys, num_kv_heads, _ = k_SGD.shape
    num_blocks, top_k = key_start_N.shape[0], picks_THK.shape[2]
    ratio = num_heads // num_kv_heads
    dk_SGD = torch.zeros(num_keys, num_kv_heads, head_dim, dtype=k_SGD.dtype, device=k_SGD.device)
    dv_SGD = torch.zeros_like(dk_SGD)
    if num_tokens == 0 or num_keys == 0:
        return torch.zeros_like(q_THD, memory_format=torch.contiguous_format), dk_SGD, dv_SGD
    groups = head_groups(picks_THK, num_kv_heads)
    if len(groups) > 1:
        parts = []
        for group in groups:
            heads = slice(group.start * ratio, group.stop * ratio)
            dlse, lse = None if dlse_TH is None else dlse_TH[:, heads].contiguous(), lse_TH[:, heads].contiguous()
            parts.append(
                launch_backward(
                    dout_THD[:, heads], dlse, q_THD[:, heads], k_SGD[:, group], v_SGD[:, group], out_THD[:, heads], lse,
                    picks_THK[:, heads], key_start_N, key_end_N, query_start_N, query_end_N, limit_T, block_size,
                    granularity, scale, deterministic,
                )
            )  # fmt: skip
        dq_THD, dk_SGD, dv_SGD = (torch.cat(grads, 1) for grads in zip(*parts, strict=True))
        return dq_THD, dk_SGD, dv_SGD
    lse2_TH, delta_TH = row_terms(dout_THD, dlse_TH, out_THD, lse_TH)
    if top_k > 1:
        lists = route(picks_THK, num_kv_heads, num_blocks, deterministic=deterministic)
    else:
        nothing = torch.zeros(1, dtype=torch.int32, device=q_THD.device)
        lists = PairLists(nothing, nothing, nothing, 0, 0)
    tiles = backward_tiles(q_THD.dtype, head_dim, block_size, num_tokens * ratio)
    # Deterministic dQ comes from its own pass, which starts from nothing.
    shape = (1,) if deterministic else (num_tokens, num_heads, head_dim)
    dq32 = torch.zeros(shape, dtype=torch.float32, device=q_THD.device)
    per_block = ceil_div(block_size, tiles.cols)
    _key_gradient_kernel[(per_block * num_blocks, num_kv_heads)](
        q_THD,
        k_SGD,
        v_SGD,
        dout_THD,
        lse2_TH,
        delta_TH,
        dq32,
        dk_SGD,
        dv_SGD,
        lists.pairs,
        lists.starts,
        lists.ends,
        key_start_N,
        key_end_N,
        query_start_N,
        query_end_N,
        limit_T,
        scale,
        scale * LOG2E,
        lists.stride,
        per_block,
        num_blocks,
        q_THD.stride(0),
        q_THD.stride(1),
        k_SGD.stride(0),
        k_SGD.stride(1),
        v_SGD.stride(0),
        v_SGD.stride(1),
        dout_THD.stride(0),
        dout_THD.stride(1),
        H=num_heads,
        RATIO=ratio,
        G=num_kv_heads,
        K=top_k,
        D=head_dim,
        DP=padded_dim(head_dim),
        BM=tiles.rows,
        BN=tiles.cols,
        ATOMIC_DQ=not deterministic,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if deterministic:
        dq_THD = launch_query_gradient(
            dout_THD, lse2_TH, delta_TH, q_THD, k_SGD, v_SGD, picks_THK, key_start_N, key_end_N, query_start_N,
            query_end_N, limit_T, block_size, granularity, scale,
        )  # fmt: skip
    else:
        dq_THD = dq32.to(q_THD.dtype)
    return dq_THD, dk_SGD, dv_SGD


def row_terms(dout_THD: Tensor, dlse_TH: Tensor | None, out_THD: Tensor, lse_TH: Tensor) -> tuple[Tensor, Tensor]:
    """lse in base 2 and delta of every row; lse and dlse are contiguous, dout and out in their rows."""
    num_tokens, num_heads, head_dim = out_THD.shape
    lse2_TH = torch.empty_like(lse_TH)
    delta_TH = torch.empty_like(lse_TH)
    rows = num_tokens * num_heads
    _row_terms_kernel[(ceil_div(rows, 32),)](
        dout_THD,
        out_THD,
        lse_TH,
        lse_TH if dlse_TH is None else dlse_TH,
        lse2_TH,
        delta_TH,
        rows,
        dout_THD.stride(0),
        dout_THD.stride(1),
        out_THD.stride(0),
        out_THD.stride(1),
        H=num_heads,
        D=head_dim,
        DP=padded_dim(head_dim),
        HAS_DLSE=dlse_TH is not None,
        BM=32,
        num_warps=4,
    )
    return lse2_TH, delta_TH


@triton.jit
def _row_terms_kernel(
    dout_ptr,
    out_ptr,
    lse_ptr,
    dlse_ptr,
    lse2_ptr,
    delta_ptr,
    num_rows,
    stride_dt,
    stride_dh,
    stride_ot,
    stride_oh,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = row < num_rows
    dim = tl.arange(0, DP)
    inside = live[:, None] & (dim < D)[None, :]
    t, h = (row // H)[:, None], (row % H)[:, None]
    dout = tl.load(dout_ptr + t * stride_dt + h * stride_dh + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + t * stride_ot + h * stride_oh + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(dout * out, axis=1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row, mask=live, other=0.0)
    lse = tl.load(lse_ptr + row, mask=live, other=0.0)
    # A query that sees nothing has lse -inf; +inf makes all its weights 0 instead of NaN.
    tl.store(lse2_ptr + row, tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634), mask=live)
    tl.store(delta_ptr + row, delta, mask=live)


@triton.jit
def _visit(
    k,
    v,
    dk,
    dv,
    row,
    live,
    allowed,
    q_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    scale,
    qk_scale,
    stride_qt,
    stride_qh,
    stride_ot,
    stride_oh,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ATOMIC_DQ: tl.constexpr,
):
    # One tile of query rows against this program's keys; [keys, queries] throughout.
    dim = tl.arange(0, DP)
    inside = live[:, None] & (dim < D)[None, :]
    t = (row // H).to(tl.int64)[:, None]
    h = (row % H).to(tl.int64)[:, None]
    q = tl.load(q_ptr + t * stride_qt + h * stride_qh + dim[None, :], mask=inside, other=0.0)
    dout = tl.load(dout_ptr + t * stride_ot + h * stride_oh + dim[None, :], mask=inside, other=0.0)
    lse2 = tl.load(lse2_ptr + row, mask=live, other=float("inf"))
    delta = tl.load(delta_ptr + row, mask=live, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    weights = tl.where(allowed, tl.exp2(scores * qk_scale - lse2[None, :]), 0.0)
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
    dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")
    dscores = (weights * (dweights - delta[None, :])).to(q.dtype)
    dk = tl.dot(dscores, q, dk, input_precision="ieee")
    if ATOMIC_DQ:
        dq = tl.dot(tl.trans(dscores), k, input_precision="ieee") * scale
        tl.atomic_add(dq_ptr + row.to(tl.int64)[:, None] * D + dim[None, :], dq, mask=inside, sem="relaxed")
    return dk, dv


@triton.jit
def _key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    pairs_ptr,
    starts_ptr,
    ends_ptr,
    key_start_ptr,
    key_end_ptr,
    query_start_ptr,
    query_end_ptr,
    limit_ptr,
    scale,
    qk_scale,
    list_stride,
    per_block,
    num_blocks,
    stride_qt,
    stride_qh,
    stride_ks,
    stride_kg,
    stride_vs,
    stride_vg,
    stride_ot,
    stride_oh,
    H: tl.constexpr,
    RATIO: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ATOMIC_DQ: tl.constexpr,
):
    block = tl.program_id(0) // per_block
    g = tl.program_id(1)
    key = tl.load(key_start_ptr + block).to(tl.int32) + tl.program_id(0) % per_block * BN
    key_end = tl.load(key_end_ptr + block).to(tl.int32)
    if key >= key_end:
        return
    keys = key + tl.arange(0, BN)
    wide = keys.to(tl.int64)[:, None]
    dim = tl.arange(0, DP)
    key_live = keys < key_end
    inside = key_live[:, None] & (dim < D)[None, :]
    k = tl.load(k_ptr + wide * stride_ks + g.to(tl.int64) * stride_kg + dim[None, :], mask=inside, other=0.0)
    v = tl.load(v_ptr + wide * stride_vs + g.to(tl.int64) * stride_vg + dim[None, :], mask=inside, other=0.0)
    dk = tl.zeros([BN, DP], dtype=tl.float32)
    dv = tl.zeros([BN, DP], dtype=tl.float32)

    first = tl.load(query_start_ptr + block).to(tl.int32)
    last = tl.load(query_end_ptr + block).to(tl.int32)
    # First own query that sees the tile's first key: limits grow, so search by halves.
    above = last
    while first < above:
        middle = (first + above) // 2
        sees = tl.load(limit_ptr + middle).to(tl.int32) > key
        above = tl.where(sees, middle, above)
        first = tl.where(sees, first, middle + 1)
    count = (last - first) * RATIO
    for start in range(0, count, BM):
        place = start + tl.arange(0, BM)
        live = place < count
        t = first + place // RATIO
        limit = tl.load(limit_ptr + t, mask=live, other=0).to(tl.int32)
        allowed = keys[:, None] < tl.minimum(limit, key_end)[None, :]
        row = t * H + g * RATIO + place % RATIO
        dk, dv = _visit(
            k, v, dk, dv, row, live, allowed, q_ptr, dout_ptr, lse2_ptr, delta_ptr, dq_ptr, scale, qk_scale, stride_qt,
            stride_qh, stride_ot, stride_oh, H, D, DP, ATOMIC_DQ,
        )  # fmt: skip
    if K > 1:
        entry = g.to(tl.int64) * num_blocks + block
        end = tl.load(ends_ptr + entry * list_stride)
        start = tl.load(starts_ptr + entry * list_stride)
        # Rows are read one tile ahead: gathers whose addresses wait for a load could not be prefetched.
        row = tl.load(pairs_ptr + start + tl.arange(0, BM), mask=start + tl.arange(0, BM) < end, other=0) // K
        for tile in range(start, end, BM):
            live = tile + tl.arange(0, BM) < end
            place = tile + BM + tl.arange(0, BM)
            upcoming = tl.load(pairs_ptr + place, mask=place < end, other=0) // K
            dk, dv = _visit(
                k, v, dk, dv, row, live, key_live[:, None], q_ptr, dout_ptr, lse2_ptr, delta_ptr, dq_ptr, scale,
                qk_scale, stride_qt, stride_qh, stride_ot, stride_oh, H, D, DP, ATOMIC_DQ,
            )  # fmt: skip
            row = upcoming

    at = (wide * G + g) * D + dim[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)
