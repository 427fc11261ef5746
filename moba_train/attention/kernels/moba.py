"""The `triton` backend: MoBA and full attention as custom ops with one autograd function.

The ops take tensors and numbers only and ask the device for nothing, so they trace under `torch.compile` and record
into CUDA graphs. Full attention is MoBA with one block per document.

T query tokens, S held key rows, H query heads, G key heads, D head dim, N blocks, K picks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moba_train.attention.custom_op import custom_op
from moba_train.attention.kernels.backward import launch_backward
from moba_train.attention.kernels.forward import launch_forward
from moba_train.attention.kernels.tiles import check_supported
from moba_train.attention.sequence import SequenceInfo

__all__ = ["dense_rows", "forward_inputs", "full_attention", "is_deterministic", "moba_attention", "moba_forward"]


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
) -> tuple[Tensor, Tensor]:
    """Attention to the picked blocks -> out [T, H, D] and natural-log lse [T, H] (fp32), both differentiable.

    Args:
        deterministic: gradients bitwise equal from run to run, at some cost; None asks torch's own switch,
            `torch.use_deterministic_algorithms`.

    Raises:
        ValueError: a CPU tensor, a dtype other than bf16, fp16 and fp32, a head dim above 256, or a scale that is not
            positive.
    """
    return _attend(q_THD, k_SGD, v_SGD, picks_THK, forward_inputs(seq, block_size, q_THD.device), scale, deterministic)


def full_attention(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, seq: SequenceInfo, *, scale: float, deterministic: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over all keys of the document at or before each query. Otherwise as `moba_attention`."""
    device = q_THD.device

    def build() -> tuple[Tensor, tuple[Tensor | int, ...]]:
        block_size = max(1, seq.max_document)
        own_T = seq.blocks(block_size).on(device).own_T
        return own_T.to(torch.int32), forward_inputs(seq, block_size, device)

    # Under one key for any length: a compiled model takes a key for a constant.
    own_T, table = seq.once(("one block a document", device), build)
    picks_THK = own_T[:, None, None].expand(-1, q_THD.shape[1], 1)
    return _attend(q_THD, k_SGD, v_SGD, picks_THK, table, scale, deterministic)


def _attend(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    picks_THK: Tensor,
    table: tuple[Tensor | int, ...],
    scale: float,
    deterministic: bool | None,
) -> tuple[Tensor, Tensor]:
    check_supported(q_THD)
    if not scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {scale}")
    return _Attend.apply(q_THD, k_SGD, v_SGD, picks_THK, table, scale, is_deterministic(deterministic))


def forward_inputs(seq: SequenceInfo, block_size: int, device: torch.device) -> tuple[Tensor | int, ...]:
    """What the ops are told of the blocks, between the picks and the scale; made once per batch."""

    def build() -> tuple[Tensor | int, ...]:
        table = seq.blocks(block_size)
        on = table.on(device)
        bounds = (on.held_start_N, on.held_end_N, on.query_start_N, on.query_end_N, on.limit_T)
        # The longest block bounds every loop; a block_size far beyond the documents must not inflate the grids.
        return *bounds, max(1, table.max_block), _granularity(seq, block_size)

    return seq.once(("forward inputs", block_size, device), build)


def _granularity(seq: SequenceInfo, block_size: int) -> int:
    # A common divisor of all block lengths: where tiles divide it, no kernel masks a short block.
    return 1 if seq.k_positions is not None else math.gcd(block_size, *seq.cu_seqlens.diff().tolist())


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THD, k_SGD, v_SGD, picks_THK, table, scale, deterministic):
        out_THD, lse_TH = moba_forward(q_THD, k_SGD, v_SGD, picks_THK, *table, scale)
        # The very k and v of the caller: context parallelism drops them here and gathers them again in backward.
        ctx.save_for_backward(q_THD, k_SGD, v_SGD, out_THD, lse_TH, picks_THK)
        ctx.rest = (*table, scale, deterministic)
        ctx.set_materialize_grads(False)
        return out_THD, lse_TH

    @staticmethod
    def backward(ctx, dout_THD, dlse_TH):
        if dout_THD is None and dlse_TH is None:
            return (None,) * 7
        if dout_THD is None:
            dout_THD = torch.zeros_like(ctx.saved_tensors[3])
        return *_backward(dout_THD, dlse_TH, *ctx.saved_tensors, *ctx.rest), None, None, None, None


def _fake_forward(q_THD, k_SGD, v_SGD, picks_THK, *_bounds_and_sizes):
    num_tokens, num_heads, _ = q_THD.shape
    return q_THD.new_empty(q_THD.shape), q_THD.new_empty((num_tokens, num_heads), dtype=torch.float32)


@custom_op("moba_forward", fake=_fake_forward)
def moba_forward(
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
    """out [T, H, D] and natural-log lse [T, H]; of the blocks it takes `forward_inputs`. Not differentiable."""
    q_THD, k_SGD, v_SGD, picks_THK = map(dense_rows, (q_THD, k_SGD, v_SGD, picks_THK))
    return launch_forward(
        q_THD, k_SGD, v_SGD, picks_THK, key_start_N, key_end_N, query_start_N, query_end_N, limit_T, block_size,
        granularity, scale,
    )  # fmt: skip


def _fake_backward(dout_THD, dlse_TH, q_THD, k_SGD, v_SGD, *_rest):
    return q_THD.new_empty(q_THD.shape), k_SGD.new_empty(k_SGD.shape), v_SGD.new_empty(v_SGD.shape)


@custom_op("moba_backward", fake=_fake_backward)
def _backward(
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
    dlse_TH = None if dlse_TH is None else dlse_TH.contiguous()
    q_THD, k_SGD, v_SGD, picks_THK = map(dense_rows, (q_THD, k_SGD, v_SGD, picks_THK))
    dout_THD, out_THD = dense_rows(dout_THD), dense_rows(out_THD)
    return launch_backward(
        dout_THD, dlse_TH, q_THD, k_SGD, v_SGD, out_THD, lse_TH.contiguous(), picks_THK, key_start_N,
        key_end_N, query_start_N, query_end_N, limit_T, block_size, granularity, scale, deterministic,
    )  # fmt: skip


def is_deterministic(asked: bool | None) -> bool:
    """What was asked, or torch's own switch."""
    return torch.are_deterministic_algorithms_enabled() if asked is None else asked


def dense_rows(tensor: Tensor) -> Tensor:
    """Kernels walk any token and head strides, but need each row's elements side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
