"""The gate on a GPU: block sums in one pass over the keys, then scores, masks and top-k in one kernel.

The scores of a tile of queries live in registers only; a running list of the best blocks per query is updated tile by
tile, so no [N, H, T] tensor exists. Means keep fp32 accuracy on the tensor cores by being split into a sum of
low-precision parts (three of bf16, or two of fp16, the second scaled up out of the subnormals).

T query tokens, S held key rows, H query heads, G key heads, D head dim, N blocks, K picks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_train.attention.custom_op import custom_op
from moba_train.attention.gate import with_first_block
from moba_train.attention.kernels.tiles import ceil_div, check_supported, gate_tiles, padded_dim, power_of_two
from moba_train.attention.sequence import SequenceInfo

__all__ = ["block_sums", "select_from_means"]


@torch.no_grad()
def block_sums(k_SGD: Tensor, seq: SequenceInfo, block_size: int) -> Tensor:
    """fp64 sums of the held rows of every block -> [N, G, D]. Same definition as `gate.block_sums`."""
    table = seq.blocks(block_size).on(k_SGD.device)
    return _sums(k_SGD, table.held_start_N, table.held_end_N)


@torch.no_grad()
def select_from_means(
    q_THD: Tensor,
    means_NGD: Tensor,
    seq: SequenceInfo,
    *,
    block_size: int,
    top_k: int,
    force_first_block: bool = False,
    force_previous_block: bool = False,
    share_picks_in_group: bool = False,
) -> Tensor:
    """Pick blocks given all block means -> int32 [T, H, K]: forced blocks, then by falling score, then -1 pads.

    Scores are fp32 sums of exact products of q and the split means; a group's are summed head by head.

    Raises:
        ValueError: a CPU tensor, a dtype other than bf16, fp16 and fp32, or a head dim above 256.
    """
    check_supported(q_THD)
    table = seq.blocks(block_size, skip_first=force_first_block).on(q_THD.device)
    scored, forced = top_k - force_first_block, 1 + force_previous_block
    picks_THK = _select(q_THD, means_NGD, table.first_T, table.own_T, scored, forced, share_picks_in_group)
    return with_first_block(picks_THK, seq, block_size) if force_first_block else picks_THK


def _fake_sums(k_SGD, start_N, end_N):
    return k_SGD.new_empty((start_N.shape[0], *k_SGD.shape[1:]), dtype=torch.float64)


@custom_op("block_sums", fake=_fake_sums)
def _sums(k_SGD: Tensor, start_N: Tensor, end_N: Tensor) -> Tensor:
    num_blocks = start_N.shape[0]
    _, num_kv_heads, head_dim = k_SGD.shape
    sums_NGD = torch.empty(num_blocks, num_kv_heads, head_dim, dtype=torch.float64, device=k_SGD.device)
    if sums_NGD.numel():
        _sums_kernel[(num_blocks, num_kv_heads)](
            k_SGD,
            start_N,
            end_N,
            sums_NGD,
            *k_SGD.stride(),
            G=num_kv_heads,
            D=head_dim,
            DP=power_of_two(head_dim),
            BN=32,
            num_warps=4,
        )
    return sums_NGD


def _fake_select(q_THD, means_NGD, first_T, own_T, top_k, forced, shared):
    return q_THD.new_empty((*q_THD.shape[:2], top_k), dtype=torch.int32)


@custom_op("select_blocks", fake=_fake_select)
def _select(
    q_THD: Tensor, means_NGD: Tensor, first_T: Tensor, own_T: Tensor, top_k: int, forced: int, shared: bool
) -> Tensor:
    num_tokens, num_heads, head_dim = q_THD.shape
    picks_THK = torch.empty(num_tokens, num_heads, top_k, dtype=torch.int32, device=q_THD.device)
    if num_tokens == 0:
        return picks_THK
    if top_k == forced:
        blocks_TK = torch.stack([own_T, torch.where(own_T > first_T, own_T - 1, -1)][:forced], 1)
        return picks_THK.copy_(blocks_TK[:, None].expand_as(picks_THK))
    parts = _split(means_NGD.float(), q_THD.dtype)
    tiles = gate_tiles(q_THD.dtype, head_dim, num_tokens)
    ratio = num_heads // means_NGD.shape[1]
    heads = ratio if shared else 1
    _select_kernel[(ceil_div(num_tokens, tiles.rows), num_heads // heads)](
        q_THD,
        parts,
        first_T,
        own_T,
        picks_THK,
        num_tokens,
        parts.stride(0),
        parts.stride(1),
        *q_THD.stride(),
        H=num_heads,
        RATIO=ratio,
        HEADS=heads,
        D=head_dim,
        DP=padded_dim(head_dim),
        K=top_k,
        FORCED=forced,
        KP=max(2, power_of_two(top_k - forced)),
        PARTS=parts.shape[0],
        BM=tiles.rows,
        BN=tiles.cols,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return picks_THK


def _split(means_NGD: Tensor, dtype: torch.dtype) -> Tensor:
    """[parts, N, G, D] in `dtype`, whose (scaled) sum is the fp32 means."""
    num_parts = {torch.bfloat16: 3, torch.float16: 2}.get(dtype, 1)
    if num_parts == 1:
        return means_NGD.contiguous()[None]
    parts = torch.empty(num_parts, *means_NGD.shape, dtype=dtype, device=means_NGD.device)
    size = means_NGD.numel()
    _split_kernel[(ceil_div(size, 1024),)](means_NGD.contiguous(), parts, size, PARTS=num_parts, WIDTH=1024)
    return parts


@triton.jit
def _sums_kernel(
    k_ptr,
    start_ptr,
    end_ptr,
    sums_ptr,
    stride_ks,
    stride_kg,
    stride_kd,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    first = tl.load(start_ptr + block)
    last = tl.load(end_ptr + block)
    dim = tl.arange(0, DP)
    total = tl.zeros([BN, DP], dtype=tl.float64)
    for row in range(first, last, BN):
        rows = row + tl.arange(0, BN)
        at = rows.to(tl.int64)[:, None] * stride_ks + g * stride_kg + dim[None, :] * stride_kd
        total += tl.load(k_ptr + at, mask=(rows < last)[:, None] & (dim < D)[None, :], other=0.0).to(tl.float64)
    tl.store(sums_ptr + (block * G + g) * D + dim, tl.sum(total, axis=0), mask=dim < D)


@triton.jit
def _split_kernel(means_ptr, parts_ptr, size, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    rest = tl.load(means_ptr + at, mask=at < size, other=0.0)
    for part in tl.static_range(PARTS):
        piece = rest.to(parts_ptr.dtype.element_ty)
        tl.store(parts_ptr + part * size + at, piece, mask=at < size)
        rest -= piece.to(tl.float32)
        if PARTS == 2:
            rest *= 2048.0


@triton.jit
def _scores(q, base, at_T, inside, stride_part, PARTS: tl.constexpr):
    # The smallest part first: little is lost under the larger ones.
    if PARTS == 3:
        scores = tl.dot(q, tl.load(base + 2 * stride_part + at_T, mask=inside, other=0.0))
        scores = tl.dot(q, tl.load(base + stride_part + at_T, mask=inside, other=0.0), scores)
        scores = tl.dot(q, tl.load(base + at_T, mask=inside, other=0.0), scores)
    elif PARTS == 2:
        scores = tl.dot(q, tl.load(base + stride_part + at_T, mask=inside, other=0.0)) * (1.0 / 2048.0)
        scores = tl.dot(q, tl.load(base + at_T, mask=inside, other=0.0), scores)
    else:
        scores = tl.dot(q, tl.load(base + at_T, mask=inside, other=0.0), input_precision="ieee")
    return scores


@triton.jit
def _select_kernel(
    q_ptr,
    means_ptr,
    first_ptr,
    own_ptr,
    picks_ptr,
    num_tokens,
    stride_part,
    stride_block,
    stride_qt,
    stride_qh,
    stride_qd,
    H: tl.constexpr,
    RATIO: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    K: tl.constexpr,
    FORCED: tl.constexpr,
    KP: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    # HEADS query heads pick together: one, or all of a group.
    h = tl.program_id(1).to(tl.int64) * HEADS
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    live = rows < num_tokens
    dim = tl.arange(0, DP)
    slot = tl.arange(0, KP)
    column = tl.arange(0, BN)

    at = rows.to(tl.int64)[:, None] * stride_qt + h * stride_qh + dim[None, :] * stride_qd
    there = live[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + at, mask=there, other=0.0)
    own = tl.load(own_ptr + rows, mask=live, other=0).to(tl.int32)
    first = tl.load(first_ptr + rows, mask=live, other=0x7FFFFFFF).to(tl.int32)

    # Unfilled places hold distinct negative ids; padding places hold +inf, which nothing evicts.
    best = tl.zeros([BM, KP], dtype=tl.float32) + tl.where(slot < K - FORCED, float("-inf"), float("inf"))[None, :]
    ids = tl.zeros([BM, KP], dtype=tl.int32) - 1 - slot[None, :]
    base = means_ptr + (h // RATIO) * D
    # Candidates end before the forced blocks.
    stop = own - (FORCED - 1)
    high = tl.max(stop, axis=0)
    for block in range(tl.min(first, axis=0), high, BN):
        blocks = block + column
        at_T = blocks.to(tl.int64)[None, :] * stride_block + dim[:, None]
        inside = (blocks < high)[None, :] & (dim < D)[:, None]
        scores = _scores(q, base, at_T, inside, stride_part, PARTS)
        if HEADS > 1:
            for other in range(1, HEADS):
                q_other = tl.load(q_ptr + at + other * stride_qh, mask=there, other=0.0)
                scores += _scores(q_other, base, at_T, inside, stride_part, PARTS)
        allowed = (blocks[None, :] >= first[:, None]) & (blocks[None, :] < stop[:, None])
        scores = tl.where(allowed, scores, float("-inf"))

        worst = tl.min(best, axis=1)
        value, index = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
        while tl.max((value > worst).to(tl.int32), axis=0) > 0:
            take = value > worst
            # Among equal scores the highest id leaves first; equal newcomers never displace (their ids are higher).
            at_worst = best == worst[:, None]
            leaving = tl.max(tl.where(at_worst, ids, -0x7FFFFFFF), axis=1)
            hit = at_worst & (ids == leaving[:, None]) & take[:, None]
            best = tl.where(hit, value[:, None], best)
            ids = tl.where(hit, (block + index)[:, None], ids)
            scores = tl.where((column[None, :] == index[:, None]) & take[:, None], float("-inf"), scores)
            worst = tl.min(best, axis=1)
            value, index = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)

    # Bits of a float order like an integer once negatives are flipped; + 0.0 makes -0.0 equal to 0.0.
    bits = (best + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - ids).to(tl.int64)
    keys = tl.where((ids >= 0) & (slot < K - FORCED)[None, :], keys, -0x8000000000000000)
    keys = tl.sort(keys, dim=1, descending=True)
    ids = tl.where(keys == -0x8000000000000000, -1, 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32))
    for head in tl.static_range(HEADS):
        out = picks_ptr + (rows.to(tl.int64) * H + h + head) * K
        tl.store(out, own, mask=live)
        if FORCED == 2:
            tl.store(out + 1, tl.where(own > first, own - 1, -1), mask=live)
        tl.store(out[:, None] + FORCED + slot[None, :], ids, mask=live[:, None] & (slot < K - FORCED)[None, :])
