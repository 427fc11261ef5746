"""Rows of queries to the order of the pair lists and back, for kernels that attend to contiguous rows.

`gather` copies the rows that each list names, side by side; `merge_parts` and `sum_parts` bring results home row by
row, each row reading its own from `PairLists.places`. So nothing is added by atomics and every order is fixed.

T query tokens, H query heads, D head dim, K picks, P pairs (room for T * H * (K - 1); the lists fill the first of it).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_train.attention.kernels.routing import PairLists
from moba_train.attention.kernels.tiles import ceil_div, padded_dim, power_of_two

__all__ = ["gather", "merge_parts", "pad_rows", "sum_parts"]

# Rows cleared behind the last pair: a tile of the attention kernel that ends there multiplies them by zero weights.
_TAIL = 512
_PROGRAMS = 8  # of a sequence whose rows are padded
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


def gather(
    lists: PairLists,
    top_k: int,
    q_THD: Tensor,
    dout_THD: Tensor | None = None,
    lse_TH: Tensor | None = None,
    delta_TH: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """q [P, D] in the lists' order; with the others also dout [P, D], lse [P] and -delta [P]."""
    num_pairs, head_dim = lists.pairs.shape[0], q_THD.shape[2]
    backward = dout_THD is not None
    # Arguments of the kernel that it does not read point at something that is there.
    other = q_THD if dout_THD is None else dout_THD
    scalar = q_THD if lse_TH is None else lse_TH
    rows = [torch.empty(num_pairs, head_dim, dtype=q_THD.dtype, device=q_THD.device) for _ in range(1 + backward)]
    numbers = [torch.empty(num_pairs, dtype=torch.float32, device=q_THD.device) for _ in range(2 * backward)]
    _gather_kernel[(ceil_div(num_pairs, 64),)](
        lists.pairs,
        lists.starts[-1:],
        q_THD,
        other,
        scalar,
        scalar if delta_TH is None else delta_TH,
        rows[0],
        rows[-1],
        *(numbers or (rows[0], rows[0])),
        num_pairs,
        q_THD.stride(0),
        q_THD.stride(1),
        other.stride(0),
        other.stride(1),
        *(scalar.stride()[:2]),
        H=q_THD.shape[1],
        K=top_k,
        D=head_dim,
        DP=padded_dim(head_dim),
        BACKWARD=backward,
        TAIL=_TAIL,
        BM=64,
        num_warps=8,
    )
    return *rows, *numbers


def pad_rows(
    lse_P: Tensor, minus_delta_P: Tensor, starts: Tensor, to_lse2: Tensor, to_delta: Tensor, multiple: int
) -> None:
    """lse in base 2 and delta as FlashAttention 4's backward reads them: every sequence a `multiple` of rows.

    Sequence b has rows starts[b] .. starts[b + 1]; its padded rows begin at (starts[b] + b * multiple) rounded down to
    a multiple. Rows that see nothing (lse -inf) get 0, as the library gives them; the padding weighs nothing.
    """
    _pad_kernel[(starts.shape[0] - 1, _PROGRAMS)](
        lse_P, minus_delta_P, starts, to_lse2, to_delta, MULTIPLE=multiple, STEP=256, PROGRAMS=_PROGRAMS, num_warps=4
    )


def merge_parts(out_THD: Tensor, lse_TH: Tensor, parts_PD: Tensor, part_lse_P: Tensor, lists: PairLists | None) -> None:
    """Merge every row's parts into out and natural-log lse, in place: out = sum exp(lse_p - lse) out_p.

    With lists, parts lie in their order and have natural-log lse. Without, a row's parts lie side by side in the order
    of its picks, with lse in base 2, -inf where there is no pick.
    """
    num_tokens, num_heads, head_dim = out_THD.shape
    assert lists is None or lists.places is not None
    rows = num_tokens * num_heads
    slots = (parts_PD.shape[0] if lists is None else lists.pairs.shape[0]) // rows
    _merge_kernel[(ceil_div(rows, 32),)](
        out_THD,
        lse_TH,
        parts_PD,
        part_lse_P,
        part_lse_P if lists is None else lists.places,
        rows,
        out_THD.stride(0),
        out_THD.stride(1),
        *lse_TH.stride(),
        H=num_heads,
        SLOTS=slots,
        SP=max(2, power_of_two(slots)),
        LISTED=lists is not None,
        D=head_dim,
        DP=padded_dim(head_dim),
        BM=32,
        num_warps=4,
    )


def sum_parts(total_THD: Tensor, parts_PD: Tensor, lists: PairLists) -> None:
    """Add every row's parts to it, in place, with fp32 sums."""
    assert lists.places is not None
    num_tokens, num_heads, head_dim = total_THD.shape
    rows = num_tokens * num_heads
    _sum_kernel[(ceil_div(rows, 16),)](
        total_THD,
        parts_PD,
        lists.places,
        rows,
        total_THD.stride(0),
        total_THD.stride(1),
        H=num_heads,
        SLOTS=lists.pairs.shape[0] // rows,
        D=head_dim,
        DP=padded_dim(head_dim),
        BM=16,
        num_warps=4,
    )


@triton.jit
def _gather_kernel(
    pairs_ptr,
    count_ptr,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    to_q_ptr,
    to_dout_ptr,
    to_lse_ptr,
    to_delta_ptr,
    num_pairs,
    stride_qt,
    stride_qh,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BACKWARD: tl.constexpr,
    TAIL: tl.constexpr,
    BM: tl.constexpr,
):
    count = tl.load(count_ptr)
    first = tl.program_id(0) * BM
    if first >= count + TAIL:
        return
    place = first + tl.arange(0, BM)
    live = place < count
    row = tl.load(pairs_ptr + place, mask=live, other=0) // K
    t = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    dim = tl.arange(0, DP)
    inside = live[:, None] & (dim < D)[None, :]
    there = (place < num_pairs)[:, None] & (dim < D)[None, :]
    to = place.to(tl.int64)[:, None] * D + dim[None, :]
    q = tl.load(q_ptr + t[:, None] * stride_qt + h[:, None] * stride_qh + dim[None, :], mask=inside, other=0.0)
    tl.store(to_q_ptr + to, q, mask=there)
    if BACKWARD:
        at = t[:, None] * stride_ot + h[:, None] * stride_oh + dim[None, :]
        tl.store(to_dout_ptr + to, tl.load(dout_ptr + at, mask=inside, other=0.0), mask=there)
        at = t * stride_lt + h * stride_lh
        tl.store(to_lse_ptr + place, tl.load(lse_ptr + at, mask=live, other=0.0), mask=place < num_pairs)
        tl.store(to_delta_ptr + place, -tl.load(delta_ptr + at, mask=live, other=0.0), mask=place < num_pairs)


@triton.jit
def _pad_kernel(
    lse_ptr,
    minus_delta_ptr,
    starts_ptr,
    to_lse2_ptr,
    to_delta_ptr,
    MULTIPLE: tl.constexpr,
    STEP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    sequence = tl.program_id(0)
    start = tl.load(starts_ptr + sequence).to(tl.int32)
    length = tl.load(starts_ptr + sequence + 1).to(tl.int32) - start
    padded = (length + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    to = (start + sequence * MULTIPLE) // MULTIPLE * MULTIPLE
    for first in range(tl.program_id(1) * STEP, padded, PROGRAMS * STEP):
        row = first + tl.arange(0, STEP)
        lse = tl.load(lse_ptr + start + row, mask=row < length, other=float("inf"))
        minus_delta = tl.load(minus_delta_ptr + start + row, mask=row < length, other=0.0)
        lse2 = tl.where(lse == float("-inf"), 0.0, lse * _LOG2E)
        tl.store(to_lse2_ptr + to + row, lse2, mask=row < padded)
        tl.store(to_delta_ptr + to + row, -minus_delta, mask=row < padded)


@triton.jit
def _places(places_ptr, row, slot, SLOTS: tl.constexpr, LISTED: tl.constexpr, there):
    at = row * SLOTS + slot
    return tl.load(places_ptr + at, mask=there, other=-1).to(tl.int64) if LISTED else tl.where(there, at, -1)


@triton.jit
def _merge_kernel(
    out_ptr,
    lse_ptr,
    parts_ptr,
    part_lse_ptr,
    places_ptr,
    rows,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    H: tl.constexpr,
    SLOTS: tl.constexpr,
    SP: tl.constexpr,
    LISTED: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
):
    part_base: tl.constexpr = _LOG2E if LISTED else 1.0
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = row < rows
    t = row // H
    h = row % H
    dim = tl.arange(0, DP)
    inside = live[:, None] & (dim < D)[None, :]
    lse_at = lse_ptr + t * stride_lt + h * stride_lh
    out_at = out_ptr + t[:, None] * stride_ot + h[:, None] * stride_oh + dim[None, :]
    own = tl.load(lse_at, mask=live, other=float("-inf")) * _LOG2E
    slot = tl.arange(0, SP)
    places = _places(places_ptr, row[:, None], slot[None, :], SLOTS, LISTED, live[:, None] & (slot < SLOTS)[None, :])
    lses = tl.load(part_lse_ptr + places, mask=places >= 0, other=float("-inf")) * part_base
    highest = tl.maximum(own, tl.max(lses, axis=1))
    # A row that has seen no key keeps -inf; it must not become inf - inf.
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(own - shift)
    total = weight + tl.sum(tl.exp2(lses - shift[:, None]), axis=1)
    acc = tl.load(out_at, mask=inside, other=0.0).to(tl.float32) * weight[:, None]
    for j in tl.range(0, SLOTS, loop_unroll_factor=2):
        place = _places(places_ptr, row, j, SLOTS, LISTED, live)
        lse = tl.load(part_lse_ptr + place, mask=place >= 0, other=float("-inf")) * part_base
        at = parts_ptr + place[:, None] * D + dim[None, :]
        # A slot without a pick has no result to read.
        part = tl.load(at, mask=(lse > float("-inf"))[:, None] & (dim < D)[None, :], other=0.0)
        acc += part.to(tl.float32) * tl.exp2(lse - shift)[:, None]
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_at, (shift + tl.log2(total)) * _LN2, mask=live)


@triton.jit
def _sum_kernel(
    total_ptr,
    parts_ptr,
    places_ptr,
    rows,
    stride_tt,
    stride_th,
    H: tl.constexpr,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = row < rows
    dim = tl.arange(0, DP)
    inside = live[:, None] & (dim < D)[None, :]
    to = total_ptr + (row // H)[:, None] * stride_tt + (row % H)[:, None] * stride_th + dim[None, :]
    acc = tl.load(to, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.range(0, SLOTS, loop_unroll_factor=4):
        place = tl.load(places_ptr + row * SLOTS + slot, mask=live, other=-1)
        at = parts_ptr + place.to(tl.int64)[:, None] * D + dim[None, :]
        acc += tl.load(at, mask=(place >= 0)[:, None] & (dim < D)[None, :], other=0.0).to(tl.float32)
    tl.store(to, acc.to(total_ptr.dtype.element_ty), mask=inside)
