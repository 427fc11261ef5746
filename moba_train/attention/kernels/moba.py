"""The `triton` backend: MoBA and full attention as custom ops with one autograd function.

The ops take tensors and numbers only and ask the device for nothing, so they trace under `torch.compile` and record
into CUDA graphs. Full attention is MoBA with one block per document.

T query tokens, S held key rows, H query heads, G key heads, D head dim, N blocks, K picks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moba_train.attention.kernels.backward import launch_backward
from moba_train.attention.kernels.forward import launch_forward
from moba_train.attention.kernels.tiles import check_supported
from moba_train.attention.sequence import SequenceInfo

__all__ = ["full_attention", "moba_attention"]


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
    check_supported(q_THD)
    if not scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {scale}")
    table = seq.blocks(block_size)
    on_device = table.on(q_THD.device)
    bounds = (
        on_device.held_start_N,
        on_device.held_end_N,
        on_device.query_start_N,
        on_device.query_end_N,
        on_device.limit_T,
    )
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    # The longest block bounds every loop; a block_size far beyond the documents must not inflate the grids.
    sizes = (max(1, table.max_block), _granularity(seq, block_size))
    return _Attend.apply(q_THD, k_SGD, v_SGD, picks_THK, bounds, sizes, scale, deterministic)


def full_attention(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, seq: SequenceInfo, *, scale: float, deterministic: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over all keys of the document at or before each query. Otherwise as `moba_attention`."""
    block_size = max(1, seq.max_document)
    own_T = seq.blocks(block_size).on(q_THD.device).own_T.to(torch.int32)
    picks_THK = own_T[:, None, None].expand(-1, q_THD.shape[1], 1)
    return moba_attention(
        q_THD, k_SGD, v_SGD, seq, picks_THK, block_size=block_size, scale=scale, deterministic=deterministic
    )


def _granularity(seq: SequenceInfo, block_size: int) -> int:
    # A common divisor of all block lengths: where tiles divide it, no kernel masks a short block.
    return 1 if seq.k_positions is not None else math.gcd(block_size, *seq.cu_seqlens.diff().tolist())


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THD, k_SGD, v_SGD, picks_THK, bounds, sizes, scale, deterministic):
        out_THD, lse_TH = _forward(q_THD, k_SGD, v_SGD, picks_THK, *bounds, *sizes, scale)
        # The very k and v of the caller: context parallelism drops them here and gathers them again in backward.
        ctx.save_for_backward(q_THD, k_SGD, v_SGD, out_THD, lse_TH, picks_THK)
        ctx.rest = (bounds, sizes, scale, deterministic)
        ctx.set_materialize_grads(False)
        return out_THD, lse_TH

    @staticmethod
    def backward(ctx, dout_THD, dlse_TH):
        q_THD, k_SGD, v_SGD, out_THD, lse_TH, picks_THK = ctx.saved_tensors
        bounds, sizes, scale, deterministic = ctx.rest
        if dout_THD is None and dlse_TH is None:
            return (None,) * 8
        if dout_THD is None:
            dout_THD = torch.zeros_like(out_THD)
        grads = _backward(
            dout_THD, dlse_TH, q_THD, k_SGD, v_SGD, out_THD, lse_TH, picks_THK, *bounds, *sizes, scale, deterministic
        )
        return *grads, None, None, None, None, None


@torch.library.custom_op("moba_train::moba_forward", mutates_args=())
def _forward(
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
    return launch_forward(
        _dense_rows(q_THD),
        _dense_rows(k_SGD),
        _dense_rows(v_SGD),
        _dense_rows(picks_THK),
        key_start_N,
        key_end_N,
        query_start_N,
        query_end_N,
        limit_T,
        block_size,
        granularity,
        scale,
    )


@_forward.register_fake
def _(q_THD, k_SGD, v_SGD, picks_THK, *_bounds_and_sizes):
    num_tokens, num_heads, _ = q_THD.shape
    return q_THD.new_empty(q_THD.shape), q_THD.new_empty((num_tokens, num_heads), dtype=torch.float32)


@torch.library.custom_op("moba_train::moba_backward", mutates_args=())
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
    return launch_backward(
        _dense_rows(dout_THD),
        None if dlse_TH is None else dlse_TH.contiguous(),
        _dense_rows(q_THD),
        _dense_rows(k_SGD),
        _dense_rows(v_SGD),
        out_THD.contiguous(),
        lse_TH.contiguous(),
        _dense_rows(picks_THK),
        key_start_N,
        key_end_N,
        query_start_N,
        query_end_N,
        limit_T,
        block_size,
        granularity,
        scale,
        deterministic,
    )


@_backward.register_fake
def _(dout_THD, dlse_TH, q_THD, k_SGD, v_SGD, *_rest):
    return q_THD.new_empty(q_THD.shape), k_SGD.new_empty(k_SGD.shape), v_SGD.new_empty(v_SGD.shape)


def _dense_rows(tensor: Tensor) -> Tensor:
    # Kernels walk any token and head strides, but need each row's elements side by side.
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
