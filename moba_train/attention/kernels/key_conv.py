"""The key convolution as Triton kernels: one pass forward, two backward, no atomics.

Backward forms the convolution again, writes its gradient (at the queries' rows, fp32) and partial sums of the
weights' gradient, then gathers each key's gradient from the rows after it.

T queries, S held key rows, G key heads, D head dim, W width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_train.attention.custom_op import custom_op
from moba_train.attention.kernels.tiles import ceil_div, check_supported, power_of_two
from moba_train.attention.sequence import SequenceInfo

__all__ = ["convolve_keys"]

_TILE = 32  # rows of a tile
_ROWS = 512  # rows whose share of the weights' gradient one program adds up


def convolve_keys(k_SGD: Tensor, weight_GDW: Tensor, seq: SequenceInfo) -> Tensor:
    """k plus SiLU of its causal convolution within each document, at the queries' rows -> [T, G, D] in k's dtype.

    Raises:
        ValueError: a CPU tensor, a dtype other than bf16, fp16 and fp32, or a head dim above 256.
    """
    check_supported(k_SGD)
    window = seq.window(weight_GDW.shape[2], k_SGD.device)
    return _Convolve.apply(k_SGD, weight_GDW, window.reach_S, window.query_S, seq.num_queries)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k_SGD, weight_GDW, reach_S, query_S, num_queries):
        ctx.save_for_backward(k_SGD, weight_GDW, reach_S, query_S)
        return _forward(k_SGD, weight_GDW, reach_S, query_S, num_queries)

    @staticmethod
    def backward(ctx, dout_TGD):
        return *_backward(dout_TGD, *ctx.saved_tensors), None, None, None


def _fake_forward(k_SGD, weight_GDW, reach_S, query_S, num_queries):
    return k_SGD.new_empty((num_queries, *k_SGD.shape[1:]))


@custom_op("convolve_keys", fake=_fake_forward)
def _forward(k_SGD: Tensor, weight_GDW: Tensor, reach_S: Tensor, query_S: Tensor, num_queries: int) -> Tensor:
    num_keys, num_kv_heads, head_dim = k_SGD.shape
    out_TGD = torch.empty(num_queries, num_kv_heads, head_dim, dtype=k_SGD.dtype, device=k_SGD.device)
    if out_TGD.numel():
        _forward_kernel[(ceil_div(num_keys, _TILE), num_kv_heads)](
            k_SGD, weight_GDW, reach_S, query_S, out_TGD, num_keys, *_strides(k_SGD, weight_GDW), **_sizes(weight_GDW)
        )
    return out_TGD


def _fake_backward(dout_TGD, k_SGD, weight_GDW, reach_S, query_S):
    return k_SGD.new_empty(k_SGD.shape), weight_GDW.new_empty(weight_GDW.shape)


@custom_op("convolve_keys_backward", fake=_fake_backward)
def _backward(
    dout_TGD: Tensor, k_SGD: Tensor, weight_GDW: Tensor, reach_S: Tensor, query_S: Tensor
) -> tuple[Tensor, Tensor]:
    num_keys, num_kv_heads, head_dim = k_SGD.shape
    width = weight_GDW.shape[2]
    dout_TGD = dout_TGD.contiguous()
    dk_SGD = torch.empty(k_SGD.shape, dtype=k_SGD.dtype, device=k_SGD.device)
    programs = ceil_div(num_keys, _ROWS)
    partial = torch.empty(programs, num_kv_heads, width, head_dim, dtype=torch.float32, device=k_SGD.device)
    if dk_SGD.numel():
        dmixed_TGD = torch.empty(dout_TGD.shape, dtype=torch.float32, device=k_SGD.device)
        strides, sizes = _strides(k_SGD, weight_GDW), _sizes(weight_GDW)
        _mixed_gradient_kernel[(programs, num_kv_heads)](
            k_SGD,
            weight_GDW,
            reach_S,
            query_S,
            dout_TGD,
            dmixed_TGD,
            partial,
            num_keys,
            *strides,
            **sizes,
            WP=power_of_two(width),
            ROWS=_ROWS,
        )
        _key_gradient_kernel[(ceil_div(num_keys, _TILE), num_kv_heads)](
            weight_GDW, reach_S, query_S, dout_TGD, dmixed_TGD, dk_SGD, num_keys, *strides[3:], **sizes
        )
    return dk_SGD, partial.sum(0).transpose(1, 2).contiguous().to(weight_GDW.dtype)


def _strides(k_SGD: Tensor, weight_GDW: Tensor) -> tuple[int, ...]:
    return *k_SGD.stride(), *weight_GDW.stride()


def _sizes(weight_GDW: Tensor) -> dict[str, int]:
    num_kv_heads, head_dim, width = weight_GDW.shape
    padded = power_of_two(head_dim)
    return {"G": num_kv_heads, "D": head_dim, "DP": padded, "W": width, "BM": _TILE, "num_warps": 4}


@triton.jit
def _convolved(k_at, w_at, reach, inside, dims, stride_ks, stride_ww, W: tl.constexpr):
    # [BM, DP] fp32: sum over lags of weight times the key that many rows before, 0 beyond the reach.
    mixed = tl.load(k_at, mask=inside, other=0.0).to(tl.float32) * tl.load(w_at, mask=dims, other=0.0).to(tl.float32)
    for lag in range(1, W):
        k = tl.load(k_at - lag * stride_ks, mask=inside & (reach >= lag)[:, None], other=0.0)
        w = tl.load(w_at + lag * stride_ww, mask=dims, other=0.0)
        mixed += k.to(tl.float32) * w.to(tl.float32)
    return mixed


@triton.jit
def _forward_kernel(
    k_ptr,
    w_ptr,
    reach_ptr,
    query_ptr,
    out_ptr,
    num_keys,
    stride_ks,
    stride_kg,
    stride_kd,
    stride_wg,
    stride_wd,
    stride_ww,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    W: tl.constexpr,
    BM: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    g = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, DP)
    dims = (dim < D)[None, :]
    reach = tl.load(reach_ptr + rows, mask=rows < num_keys, other=-1)
    query = tl.load(query_ptr + rows, mask=rows < num_keys, other=-1)
    inside = (query >= 0)[:, None] & dims
    k_at = k_ptr + rows.to(tl.int64)[:, None] * stride_ks + g * stride_kg + dim[None, :] * stride_kd
    w_at = w_ptr + g * stride_wg + dim[None, :] * stride_wd
    mixed = _convolved(k_at, w_at, reach, inside, dims, stride_ks, stride_ww, W)
    out = tl.load(k_at, mask=inside, other=0.0).to(tl.float32) + mixed * tl.sigmoid(mixed)
    out_at = out_ptr + (query.to(tl.int64)[:, None] * G + g) * D + dim[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mixed_gradient_kernel(
    k_ptr,
    w_ptr,
    reach_ptr,
    query_ptr,
    dout_ptr,
    dmixed_ptr,
    partial_ptr,
    num_keys,
    stride_ks,
    stride_kg,
    stride_kd,
    stride_wg,
    stride_wd,
    stride_ww,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    W: tl.constexpr,
    BM: tl.constexpr,
    WP: tl.constexpr,
    ROWS: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    g = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, DP)
    dims = (dim < D)[None, :]
    lags = tl.arange(0, WP)
    w_at = w_ptr + g * stride_wg + dim[None, :] * stride_wd
    dw = tl.zeros([WP, DP], dtype=tl.float32)
    for start in range(first, min(first + ROWS, num_keys), BM):
        rows = start + tl.arange(0, BM)
        reach = tl.load(reach_ptr + rows, mask=rows < num_keys, other=-1)
        query = tl.load(query_ptr + rows, mask=rows < num_keys, other=-1)
        inside = (query >= 0)[:, None] & dims
        k_at = k_ptr + rows.to(tl.int64)[:, None] * stride_ks + g * stride_kg + dim[None, :] * stride_kd
        mixed = _convolved(k_at, w_at, reach, inside, dims, stride_ks, stride_ww, W)
        at = (query.to(tl.int64)[:, None] * G + g) * D + dim[None, :]
        share = tl.sigmoid(mixed)
        dmixed = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32) * share * (1.0 + mixed * (1.0 - share))
        tl.store(dmixed_ptr + at, dmixed, mask=inside)
        for lag in range(0, W):
            k = tl.load(k_at - lag * stride_ks, mask=inside & (reach >= lag)[:, None], other=0.0).to(tl.float32)
            dw += tl.where((lags == lag)[:, None], tl.sum(dmixed * k, axis=0)[None, :], 0.0)
    partial_at = partial_ptr + ((tl.program_id(0).to(tl.int64) * G + g) * W + lags[:, None]) * D + dim[None, :]
    tl.store(partial_at, dw, mask=(lags < W)[:, None] & dims)


@triton.jit
def _key_gradient_kernel(
    w_ptr,
    reach_ptr,
    query_ptr,
    dout_ptr,
    dmixed_ptr,
    dk_ptr,
    num_keys,
    stride_wg,
    stride_wd,
    stride_ww,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    W: tl.constexpr,
    BM: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    g = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, DP)
    dims = (dim < D)[None, :]
    w_at = w_ptr + g * stride_wg + dim[None, :] * stride_wd
    query = tl.load(query_ptr + rows, mask=rows < num_keys, other=-1)
    at = (query.to(tl.int64)[:, None] * G + g) * D + dim[None, :]
    dk = tl.load(dout_ptr + at, mask=(query >= 0)[:, None] & dims, other=0.0).to(tl.float32)
    for lag in range(0, W):
        # The key enters the convolution of the row `lag` later, where that row reaches back so far.
        later = rows + lag
        reach = tl.load(reach_ptr + later, mask=later < num_keys, other=-1)
        query = tl.load(query_ptr + later, mask=(later < num_keys) & (reach >= lag), other=-1)
        at = (query.to(tl.int64)[:, None] * G + g) * D + dim[None, :]
        dmixed = tl.load(dmixed_ptr + at, mask=(query >= 0)[:, None] & dims, other=0.0)
        dk += dmixed * tl.load(w_at + lag * stride_ww, mask=dims, other=0.0).to(tl.float32)
    dk_at = dk_ptr + (rows.to(tl.int64)[:, None] * G + g) * D + dim[None, :]
    tl.store(dk_at, dk.to(dk_ptr.dtype.element_ty), mask=(rows < num_keys)[:, None] & dims)
