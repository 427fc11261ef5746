"""The `flash` backend: MoBA and full attention composed of FlashAttention 4's varlen kernels.

Causal parts (documents for full attention, own blocks for MoBA) run where they lie (varlen.py). Earlier blocks: the
rows that picked a block are gathered next to each other, in the order of a counting sort on the device, and a block
with its rows is a sequence without a mask. The rows come home by log-sum-exp. Backward calls the library's kernel per
part with the rows' merged lse and delta, which makes the parts' gradients exact without a backward of the merge.

Gathered rows are staged for a few key heads, or part of the query heads or tokens of one, at a time. No size is asked
of the device: bounds stay there, and what the host needs are upper bounds.

The `mixed` backend (mixed.py) is this one with the forward of the Triton kernels: both keep the same tensors.

T query tokens, S held key rows, H query heads, G key heads, D head dim, N blocks, K picks, P room for pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moba_train.attention import flash_library, varlen
from moba_train.attention.custom_op import custom_op
from moba_train.attention.flash_staging import groups_of
from moba_train.attention.kernels.backward import row_terms
from moba_train.attention.kernels.gather import gather, merge_parts, sum_parts
from moba_train.attention.kernels.moba import dense_rows, forward_inputs, is_deterministic, moba_forward
from moba_train.attention.kernels.routing import PairLists, route
from moba_train.attention.sequence import SequenceInfo, copy_to
from moba_train.attention.varlen import VarlenCall

__all__ = ["full_attention", "moba_attention"]

_SUMMED_AT_ONCE = 4  # pieces whose dk and dv wait, in the inputs' dtype, to be added up in fp32, in one pass


def full_attention(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, seq: SequenceInfo, *, scale: float, deterministic: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over all keys of the document at or before each query. Otherwise as `moba_attention`."""
    _check(q_THD, scale)
    calls = varlen.pack(varlen.dense_calls(seq, q_THD.device))
    return _Flash.apply(q_THD, k_SGD, v_SGD, None, calls, None, 0, scale, is_deterministic(deterministic), None)


def moba_attention(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    seq: SequenceInfo,
    picks_THK: Tensor,
    *,
    block_size: int,
    scale: float,
    deterministic: bool | None = None,
    triton_forward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention to the picked blocks -> out [T, H, D] and natural-log lse [T, H] (fp32), both differentiable.

    Args:
        deterministic: gradients bitwise equal from run to run; None asks `torch.use_deterministic_algorithms`.
        triton_forward: the forward of the Triton kernels before this backward.

    Raises:
        ValueError: what FlashAttention 4 does not serve (device, dtype, head dim), a library that is not installed, or
            a scale that is not positive.
    """
    _check(q_THD, scale)
    table = seq.blocks(block_size)
    calls = varlen.pack(varlen.own_calls(seq, block_size, q_THD.device))
    if seq.k_positions is not None:
        # A block of which no row is held shows nothing; the library takes no sequence without keys.
        on_device = table.on(q_THD.device)
        held_N = on_device.held_end_N > on_device.held_start_N
        known = (picks_THK >= 0) & held_N[picks_THK.clamp(min=0)]
        picks_THK = torch.where(known, picks_THK, -1)
    bounds = seq.once(("key bounds", block_size, q_THD.device), lambda: _key_bounds(seq, block_size, q_THD.device))
    longest = max(1, table.max_block)
    ahead = forward_inputs(seq, block_size, q_THD.device) if triton_forward else None
    rest = (bounds, longest, scale, is_deterministic(deterministic), ahead)
    return _Flash.apply(q_THD, k_SGD, v_SGD, picks_THK, calls, *rest)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, picks_THK: Tensor | None, calls: Any, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        *sizes, scale, deterministic, ahead = rest
        if ahead is None:
            out_THD, lse_TH = _forward(q_THD, k_SGD, v_SGD, picks_THK, *calls, *sizes, scale)
        else:
            out_THD, lse_TH = moba_forward(q_THD, k_SGD, v_SGD, picks_THK, *ahead, scale)
        ctx.save_for_backward(q_THD, k_SGD, v_SGD, out_THD, lse_TH, *(() if picks_THK is None else (picks_THK,)))
        ctx.rest = (*calls, *sizes, scale, deterministic)
        ctx.set_materialize_grads(False)
        return out_THD, lse_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor | None, dlse_TH: Tensor | None) -> tuple[Tensor | None, ...]:
        q_THD, k_SGD, v_SGD, out_THD, lse_TH, *picks = ctx.saved_tensors
        if dout_THD is None and dlse_TH is None:
            return (None,) * 10
        if dout_THD is None:
            dout_THD = torch.zeros_like(out_THD)
        picks_THK = picks[0] if picks else None
        grads = _backward(dout_THD, dlse_TH, q_THD, k_SGD, v_SGD, out_THD, lse_TH, picks_THK, *ctx.rest)
        return *grads, None, None, None, None, None, None, None


def _fake_forward(q_THD: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return q_THD.new_empty(q_THD.shape), q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)


@custom_op("flash_forward", fake=_fake_forward)
def _forward(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    picks_THK: Tensor | None,
    tensors: list[Tensor],
    numbers: list[int],
    key_bounds: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q_THD, k_SGD, v_SGD = (dense_rows(tensor) for tensor in (q_THD, k_SGD, v_SGD))
    calls = list(varlen.unpack(tensors, numbers))
    # Rows that no call reaches see nothing.
    whole = len(calls) == 1 and not calls[0].rows.numel() and calls[0].last - calls[0].first == q_THD.shape[0]
    out_THD = (torch.empty if whole else torch.zeros)(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    lse_TH = torch.full(q_THD.shape[:2], -torch.inf, dtype=torch.float32, device=q_THD.device)
    for call in calls:
        q, out, lse = (_queries_of(call, tensor) for tensor in (q_THD, out_THD, lse_TH))
        part, part_lse = flash_library.forward(
            q, k_SGD, v_SGD, call.queries, call.keys, **_sizes(call), scale=scale, out_PHD=_in_place(call, out)
        )
        if call.rows.numel():
            out_THD.index_copy_(0, call.rows, part)
            lse_TH.index_copy_(0, call.rows, part_lse.T)
        else:
            lse.copy_(part_lse.T)
    if picks_THK is None or picks_THK.shape[2] == 1 or out_THD.numel() == 0 or k_SGD.numel() == 0:
        return out_THD, lse_TH
    assert key_bounds is not None
    for group in groups_of(q_THD, picks_THK, k_SGD, key_bounds, backward=False):
        k_S1D, v_S1D, keys = group.keys_of(k_SGD, v_SGD, key_bounds)
        for at in group.pieces:
            lists = route(picks_THK[at], group.size, group.num_blocks, places=True)
            (q_PD,) = gather(lists, picks_THK.shape[2], q_THD[at])
            parts_PHD, lses_HP = flash_library.forward(
                q_PD[:, None], k_S1D, v_S1D, _queries(lists), keys, **group.sizes(at, block_size), scale=scale
            )
            merge_parts(out_THD[at], lse_TH[at], parts_PHD[:, 0], lses_HP[0], lists)
            del q_PD, parts_PHD, lses_HP, lists  # before the next slice's are allocated
    return out_THD, lse_TH


def _fake_backward(
    dout_THD: Tensor, dlse_TH: Tensor | None, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q_THD.new_empty(q_THD.shape), k_SGD.new_empty(k_SGD.shape), v_SGD.new_empty(v_SGD.shape)


@custom_op("flash_backward", fake=_fake_backward)
def _backward(
    dout_THD: Tensor,
    dlse_TH: Tensor | None,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    out_THD: Tensor,
    lse_TH: Tensor,
    picks_THK: Tensor | None,
    tensors: list[Tensor],
    numbers: list[int],
    key_bounds: Tensor | None,
    block_size: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    q_THD, k_SGD, v_SGD, dout_THD = (dense_rows(tensor) for tensor in (q_THD, k_SGD, v_SGD, dout_THD))
    out_THD, lse_TH = out_THD.contiguous(), lse_TH.contiguous()
    dlse_TH = None if dlse_TH is None else dlse_TH.contiguous()
    options: dict[str, Any] = {"scale": scale, "deterministic": deterministic}
    calls = list(varlen.unpack(tensors, numbers))
    dq_THD = torch.zeros(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    key_grads: list[tuple[Tensor, Tensor]] = []
    for call in calls:
        q, out, dout, lse, dq = (_queries_of(call, t) for t in (q_THD, out_THD, dout_THD, lse_TH, dq_THD))
        dlse = None if dlse_TH is None else _queries_of(call, dlse_TH).T.contiguous()
        part, *grads = flash_library.backward(
            dout, dlse, q, k_SGD, v_SGD, out, lse.T.contiguous(), call.queries, call.keys, **_sizes(call), **options,
            dq_PHD=_in_place(call, dq),
        )  # fmt: skip
        if call.rows.numel():
            dq_THD.index_copy_(0, call.rows, part)
        key_grads.append((grads[0], grads[1]))
    dk_SGD, dv_SGD = _total(key_grads, k_SGD)
    if picks_THK is None or picks_THK.shape[2] == 1 or dq_THD.numel() == 0 or dk_SGD.numel() == 0:
        return dq_THD, dk_SGD, dv_SGD
    _, delta_TH = row_terms(dout_THD, dlse_TH, out_THD, lse_TH)
    assert key_bounds is not None
    for group in groups_of(q_THD, picks_THK, k_SGD, key_bounds, backward=True):
        k_S1D, v_S1D, keys = group.keys_of(k_SGD, v_SGD, key_bounds)
        totals: list[Tensor] = []
        for first in range(0, len(group.pieces), _SUMMED_AT_ONCE):
            pieces = group.pieces[first : first + _SUMMED_AT_ONCE]
            parts_nS1D = [k_S1D.new_empty(len(pieces), *k_S1D.shape) for _ in range(2)]
            for number, at in enumerate(pieces):
                lists = route(picks_THK[at], group.size, group.num_blocks, deterministic=deterministic, places=True)
                rows = (tensor[at] for tensor in (q_THD, dout_THD, lse_TH, delta_TH))
                q_PD, dout_PD, lse_P, minus_delta_P = gather(lists, picks_THK.shape[2], *rows)
                dk_S1D, dv_S1D = (parts[number] for parts in parts_nS1D)
                flash_library.backward(
                    dout_PD[:, None], minus_delta_P[None], q_PD[:, None], k_S1D, v_S1D, None, lse_P[None],
                    _queries(lists), keys, **group.sizes(at, block_size), **options, dq_PHD=q_PD[:, None],
                    dk_SGD=dk_S1D, dv_SGD=dv_S1D,
                )  # fmt: skip
                sum_parts(dq_THD[at], q_PD, lists)
                del q_PD, dout_PD, lists  # before the next slice's are allocated
            sums = [parts.sum(0, dtype=torch.float32) for parts in parts_nS1D]
            totals = [total.add_(part) for total, part in zip(totals, sums, strict=True)] if totals else sums
        for grad_SGD, total_S1D in zip((dk_SGD, dv_SGD), totals, strict=True):
            grad_SGD[:, group.key_heads] += total_S1D.view(group.size, -1, total_S1D.shape[-1]).transpose(0, 1)
    return dq_THD, dk_SGD, dv_SGD


def _queries(lists: PairLists) -> Tensor:
    return lists.starts[:: lists.stride].contiguous()


def _key_bounds(seq: SequenceInfo, block_size: int, device: torch.device) -> Tensor:
    starts_N = seq.blocks(block_size).held_start_N
    return copy_to(torch.cat([starts_N, torch.tensor([seq.num_held])]).to(torch.int32), device)


def _sizes(call: VarlenCall) -> dict[str, Any]:
    return {"max_queries": call.max_queries, "max_keys": call.max_keys, "causal": call.causal}


def _queries_of(call: VarlenCall, tensor: Tensor) -> Tensor:
    return tensor.index_select(0, call.rows) if call.rows.numel() else tensor[call.first : call.last]


def _in_place(call: VarlenCall, tensor: Tensor) -> Tensor | None:
    return None if call.rows.numel() else tensor


def _total(grads: list[tuple[Tensor, Tensor]], k_SGD: Tensor) -> tuple[Tensor, Tensor]:
    if len(grads) == 1:
        dk_SGD, dv_SGD = grads[0]
        return dk_SGD.contiguous(), dv_SGD.contiguous()  # the library's have k's strides, which may be permuted
    dk_SGD, dv_SGD = (torch.zeros(k_SGD.shape, dtype=torch.float32, device=k_SGD.device) for _ in range(2))
    for dk, dv in grads:
        dk_SGD += dk
        dv_SGD += dv
    return dk_SGD.to(k_SGD.dtype), dv_SGD.to(k_SGD.dtype)


def _check(q_THD: Tensor, scale: float) -> None:
    refusal = flash_library.refusal(q_THD)
    if refusal is not None:
        raise ValueError(f"the flash backend {refusal}; use backend='triton', or 'sdpa' for full attention")
    if not scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {scale}")
