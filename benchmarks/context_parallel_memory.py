"""An op that needs nothing but its results, and the allocator's peak of a call: all memory above is communication's.

Letters: T query rows, S key rows, H query heads, G key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moba_train.attention import SequenceInfo

__all__ = ["peak_of", "stand_in"]


def stand_in(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, seq: SequenceInfo) -> tuple[Tensor, Tensor]:
    return _StandIn.apply(q_THD, k_SGD, v_SGD)


def peak_of(call: Callable[[], object]) -> tuple[int, object]:
    """Bytes that `call` had allocated at its peak above those before, and its result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


class _StandIn(torch.autograd.Function):
    """Saves and returns what attention does, computes nothing."""

    @staticmethod
    def forward(ctx, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor):
        out, lse = torch.empty_like(q_THD), q_THD.new_zeros(q_THD.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q_THD, k_SGD, v_SGD, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out: Tensor, grad_lse: Tensor):
        q_THD, k_SGD, v_SGD, _, _ = ctx.saved_tensors
        return torch.empty_like(q_THD), torch.empty_like(k_SGD), torch.empty_like(v_SGD)
