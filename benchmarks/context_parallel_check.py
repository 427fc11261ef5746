"""Whether an op shared by ranks gives what it gives on one device: asked before it is timed.

Letters: T rows of all ranks, t of this one, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.attention import SequenceInfo

__all__ = ["LIMITS", "error_of", "results"]

# Of a row's size, or of the mean row's where that is larger. Rounding stays far below; one wrong pick in twelve is 0.4.
LIMITS = {torch.bfloat16: 0.1, torch.float32: 1e-4}


def results(op: Callable, settings: dict[str, int], tensors: list[Tensor], seq: SequenceInfo) -> list[Tensor]:
    """out and the gradients of q, k and v; `tensors` are those three and the gradient of out."""
    *inputs, grad = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, _ = op(*leaves, seq, **settings)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def error_of(found: list[Tensor], expected: list[Tensor], group: dist.ProcessGroup) -> float:
    """The largest error of any row of these tensors on any rank; infinite where a number is none."""
    errors = [_error(x, y) for x, y in zip(found, expected, strict=True)]
    worst = torch.stack(errors).amax().nan_to_num(nan=torch.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group)
    return float(worst)


def _error(found_tHD: Tensor, expected_tHD: Tensor) -> Tensor:
    """Of each row of a head, the root mean square of the difference over that of the row; the largest."""
    difference_tH = (found_tHD.float() - expected_tHD.float()).square().mean(-1)
    size_tH = expected_tHD.float().square().mean(-1)
    return (difference_tH / size_tH.clamp(min=float(size_tH.mean()))).amax().sqrt()
