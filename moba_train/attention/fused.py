"""PyTorch's fused attention kernels for one rectangle or causal square of full attention, with lse, for dense.py.

The public scaled_dot_product_attention hides lse, so the ATen operators under it are called. On a GPU fp32 is served by
the memory-efficient kernel and 16 bits by FlashAttention 2, or by cuDNN on Hopper and newer: on an H200 it takes 0.5 to
0.6 of the time (head dim 128, benchmarks/results/attention_h200_2026-11-23.md). cuDNN makes a plan for every new shape,
which costs more than it saves where lengths change from batch to batch or queries are few: so it gets only long batches
of one document, in runs that are not short. (A prompt of a new length pays for its plans once.) Nor does it get any
under `torch.use_deterministic_algorithms`, which FlashAttention 2 heeds.

The memory-efficient kernel is kept from 16 bits: there its gradients are wrong unless `out` lies in memory as its own
forward laid it, heads between rows (PyTorch 2.11).

Letters: G key heads, R query heads of each, L queries, Z keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from moba_train.attention.sequence import SequenceInfo

__all__ = ["Kernel", "choose", "describe"]

_ATEN = torch.ops.aten
_LSE_ALIGNMENT = 32  # the efficient kernel reads lse in rows of this multiple
_HOPPER = 9
_WORTH_PLANS = 4096  # queries
_SHORTEST_SIDE = 256  # of a run's rectangle and square, each of which has a plan of its own; one key alone it refuses


class Kernel(NamedTuple):
    """q, out, dout, dq [G, R, L, D]; k, v [G, R, Z, D], where R may share memory; lse [G, R, L], natural logarithm.

    forward(q, k, v, causal, scale) -> out, lse
    backward(dout, q, k, v, out, lse, causal, scale) -> dq and of the keys, [G, R or 1, Z, D], to be summed over R
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]]


def choose(q_THD: Tensor, seq: SequenceInfo) -> Kernel:
    """The fastest kernel that serves these queries."""
    if q_THD.device.type == "cpu":
        return Kernel(_cpu, _cpu_backward)
    if q_THD.dtype == torch.float32:
        return Kernel(_efficient, _efficient_backward)
    return Kernel(_cudnn, _cudnn_backward) if _cudnn_serves(q_THD, seq) else Kernel(_flash, _flash_backward)


def describe(q_THD: Tensor) -> str:
    """In words, for the log: whose kernels serve such queries."""
    if q_THD.device.type == "cpu":
        return "PyTorch's kernel for CPUs"
    if q_THD.dtype == torch.float32:
        return "PyTorch's memory-efficient kernels"
    return "FlashAttention 2" + ", cuDNN for long batches of one document" * _cudnn_is_there(q_THD)


def _cudnn_serves(q_THD: Tensor, seq: SequenceInfo) -> bool:
    if q_THD.shape[0] < _WORTH_PLANS or seq.max_document != seq.num_keys or not _cudnn_is_there(q_THD):
        return False
    sides = ((r.q_end - r.q_start, r.k_diagonal - r.k_start, r.k_end - r.k_diagonal) for r in seq.runs)
    return min(side for run in sides for side in run if side) >= _SHORTEST_SIDE


def _cudnn_is_there(q_THD: Tensor) -> bool:
    head_dim = q_THD.shape[2]
    return (
        head_dim % 8 == 0
        and head_dim <= 128
        and torch.backends.cudnn.is_available()
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.version.hip is None
        and not torch.are_deterministic_algorithms_enabled()
        and torch.cuda.get_device_capability(q_THD.device)[0] >= _HOPPER
    )


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


def _efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _ATEN._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lse, unused = pad(lse.contiguous(), (0, -q.shape[2] % _LSE_ALIGNMENT)), _no_dropout(q)
    return _ATEN._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, unused, unused, 0.0, [True, True, True, False], causal, scale=scale
    )[:3]


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    head_dim = q.shape[3]
    q, k, v = (pad(tensor, (0, -head_dim % 8)) for tensor in (q, k, v))
    out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out[..., :head_dim], lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lse, unused, head_dim = lse.contiguous(), _no_dropout(q), q.shape[3]
    dout, q, k, v, out = (pad(tensor, (0, -head_dim % 8)) for tensor in (dout, q, k, v, out))
    grads = _ATEN._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused, scale=scale
    )
    dq, dk, dv = (grad[..., :head_dim] for grad in grads)
    return dq, dk, dv


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    heads = (_as_heads(q), _as_heads(k[:, :1]), _as_heads(v[:, :1]))  # it takes groups as they are
    out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(*heads, None, True, 0.0, causal, False, scale=scale)
    return out[0].unflatten(0, q.shape[:2]), lse.reshape(q.shape[:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads = (_as_heads(dout), _as_heads(q), _as_heads(k[:, :1]), _as_heads(v[:, :1]), _as_heads(out))
    lse, unused = lse.contiguous().view(1, -1, q.shape[2], 1), _no_dropout(q)
    dq, dk, dv = _ATEN._scaled_dot_product_cudnn_attention_backward(
        *heads, lse, unused, unused, None, None, None, q.shape[2], k.shape[2], 0.0, causal, scale=scale
    )
    return dq[0].unflatten(0, q.shape[:2]), dk[0][:, None], dv[0][:, None]


def _as_heads(grouped_GRLD: Tensor) -> Tensor:
    """[G, R, L, D] -> a [1, G * R, L, D] view."""
    return grouped_GRLD.flatten(0, 1)[None]


def _no_dropout(q: Tensor) -> Tensor:
    """Stands for dropout's seed and offset."""
    return torch.zeros((), dtype=torch.int64, device=q.device)
