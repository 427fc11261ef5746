"""Full causal attention by PyTorch's fused kernels, document by document, with lse.

Queries are cut into runs of neighbouring rows (`SequenceInfo.runs`). A run attends to the keys before it unmasked and
to its own rows causally: whole documents, zigzag shards, chunked prefill and partial keys are rectangles and squares,
merged by log-sum-exp, and there is never a mask. Backward calls the fused kernel per part with the merged out and lse,
which makes the parts' gradients exact without a backward of the merge.

Key heads are batch and the R query heads of a group are heads, over an expanded view: K and V are never copied to H
heads. The kernels are in fused.py.

Letters: T queries, S held key rows, H query heads, G key heads, R = H // G, D head dim, L queries of a run, Z its keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from moba_train.attention import fused
from moba_train.attention.merge import merge
from moba_train.attention.precision import accumulator
from moba_train.attention.sequence import DenseRun, SequenceInfo

__all__ = ["full_attention"]

_LARGEST_WITH_LSE = 248  # FlashAttention 2 takes 256, of which a gradient of lse needs 8


def full_attention(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, seq: SequenceInfo, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over all keys of the document at or before each query -> out [T, H, D], lse [T, H].

    Raises:
        ValueError: fp64 on a GPU, which no fused kernel serves; in backward, a gradient of lse in 16 bits on a GPU with
            a head dim above 248.
    """
    if q_THD.device.type == "cuda" and q_THD.dtype == torch.float64:
        raise ValueError("no fused GPU kernel computes fp64 attention; use backend='reference' or fp32 inputs")
    return _FullAttention.apply(q_THD, k_SGD, v_SGD, seq, scale)


class _FullAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, seq: SequenceInfo, scale: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        num_queries, num_heads, _ = q_THD.shape
        num_key_heads = k_SGD.shape[1]
        group = num_heads // num_key_heads
        wide = accumulator(q_THD.dtype)
        kernel = fused.choose(q_THD, seq)
        out_THD = torch.zeros_like(q_THD, memory_format=torch.contiguous_format)
        lse_TH = q_THD.new_full((num_queries, num_heads), -torch.inf, dtype=wide)
        for run in seq.runs:
            q_GRLD = _by_group(q_THD[run.q_start : run.q_end], num_key_heads)
            parts = []
            for start, end, causal in _parts(run):
                k_GRZD, v_GRZD = (_expand(tensor[start:end], group) for tensor in (k_SGD, v_SGD))
                parts.append(kernel.forward(q_GRLD, k_GRZD, v_GRZD, causal, scale))
            if parts:
                out_GRLD, lse_GRL = merge(parts) if len(parts) > 1 else parts[0]
                out_THD[run.q_start : run.q_end] = _by_row(out_GRLD)
                lse_TH[run.q_start : run.q_end] = _by_row(lse_GRL[..., None])[..., 0]
        ctx.save_for_backward(q_THD, k_SGD, v_SGD, out_THD, lse_TH)
        ctx.settings = (seq, scale)
        return out_THD, lse_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor | None, dlse_TH: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout_THD is None and dlse_TH is None:
            return (None,) * 5
        q_THD, k_SGD, v_SGD, out_THD, lse_TH = ctx.saved_tensors
        seq, scale = ctx.settings
        shapes = q_THD.shape, k_SGD.shape, v_SGD.shape
        dtype, head_dim = q_THD.dtype, q_THD.shape[2]
        if dout_THD is None:
            dout_THD = torch.zeros_like(out_THD)
        if dlse_TH is not None:
            # The kernels know no dlse. A column with out = 1, dout = -dlse and v = 0 subtracts it from dout . out.
            if q_THD.device.type == "cuda" and dtype != torch.float32 and head_dim > _LARGEST_WITH_LSE:
                raise ValueError(
                    f"a gradient of lse in {dtype} on a GPU: sdpa forms it up to head dim {_LARGEST_WITH_LSE}, got "
                    f"{head_dim}; use backend='triton'"
                )
            q_THD, k_SGD, v_SGD, out_THD, dout_THD = (pad(t, (0, 8)) for t in (q_THD, k_SGD, v_SGD, out_THD, dout_THD))
            out_THD[..., head_dim] = 1.0
            dout_THD[..., head_dim] = -dlse_TH
        kernel = fused.choose(q_THD, seq)
        num_key_heads = k_SGD.shape[1]
        group = q_THD.shape[1] // num_key_heads
        dq_THD, dk_SGD, dv_SGD = (torch.zeros(shape, dtype=lse_TH.dtype, device=lse_TH.device) for shape in shapes)
        for run in seq.runs:
            rows = slice(run.q_start, run.q_end)
            q_GRLD, out_GRLD, dout_GRLD = (_by_group(t[rows], num_key_heads) for t in (q_THD, out_THD, dout_THD))
            lse_GRL = _by_group(lse_TH[rows][..., None], num_key_heads)[..., 0]
            for start, end, causal in _parts(run):
                k_GRZD, v_GRZD = (_expand(tensor[start:end], group) for tensor in (k_SGD, v_SGD))
                dq_GRLD, dk_GRZD, dv_GRZD = kernel.backward(
                    dout_GRLD, q_GRLD, k_GRZD, v_GRZD, out_GRLD, lse_GRL, causal, scale
                )
                dq_THD[rows] += _by_row(dq_GRLD[..., :head_dim])
                for total, part in ((dk_SGD, dk_GRZD), (dv_SGD, dv_GRZD)):
                    total[start:end] += part[..., :head_dim].sum(1, dtype=total.dtype).transpose(0, 1)
        return dq_THD.to(dtype), dk_SGD.to(dtype), dv_SGD.to(dtype), None, None


def _parts(run: DenseRun) -> Iterator[tuple[int, int, bool]]:
    """(first key, last key, causal) of the rectangle before the run and of its own square, where not empty."""
    if run.k_start < run.k_diagonal:
        yield run.k_start, run.k_diagonal, False
    if run.k_diagonal < run.k_end:
        yield run.k_diagonal, run.k_end, True


def _by_group(rows_LHD: Tensor, num_key_heads: int) -> Tensor:
    """[L, H, D] -> [G, R, L, D], rows contiguous in D as the kernels need."""
    rows_LGRD = rows_LHD.unflatten(1, (num_key_heads, -1)).permute(1, 2, 0, 3)
    return rows_LGRD if rows_LGRD.stride(-1) == 1 else rows_LGRD.contiguous()


def _by_row(grouped_GRLD: Tensor) -> Tensor:
    """[G, R, L, D] -> [L, H, D]."""
    return grouped_GRLD.permute(2, 0, 1, 3).flatten(1, 2)


def _expand(keys_ZGD: Tensor, group: int) -> Tensor:
    """[Z, G, D] -> a [G, R, Z, D] view in which the R heads of a group share memory."""
    keys_GZD = keys_ZGD.transpose(0, 1)
    if keys_GZD.stride(-1) != 1:
        keys_GZD = keys_GZD.contiguous()
    return keys_GZD[:, None].expand(-1, group, -1, -1)
