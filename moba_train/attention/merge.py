"""Combine attention over disjoint sets of keys by log-sum-exp (online softmax).

With lse_p = log sum_{keys of part p} exp(logit) and out_p the softmax average over part p alone:

    lse = log sum_p exp(lse_p)          out = sum_p exp(lse_p - lse) * out_p

which is attention over the union, exactly. A part that shows a query nothing has lse -inf and out 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["merge"]


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge (out_THD, lse_TH) pairs into one pair; differentiable in every out and lse.

    Any logit size is safe: exponents are taken relative to the largest lse. A query that no part shows a key gets out 0
    and lse -inf, with zero gradients. The result has the widest dtype among the outs; sums run in the dtype of lse.

    Raises:
        ValueError: if `parts` is empty.
    """
    if not parts:
        raise ValueError("merge needs at least one (out, lse) pair, got none")
    outs, lses = [out for out, _ in parts], torch.stack([lse for _, lse in parts])
    highest_TH = lses.detach().amax(0)
    highest_TH = highest_TH.masked_fill(highest_TH == -torch.inf, 0.0)
    weights = (lses - highest_TH).exp()
    total_TH = weights.sum(0)
    empty_TH = total_TH == 0
    # Filled before the division and the logarithm, so that their gradients stay finite too.
    total_TH = total_TH.masked_fill(empty_TH, 1.0)
    shares = weights / total_TH
    out_THD = sum(share[..., None] * out for share, out in zip(shares, outs, strict=True))
    dtype = outs[0].dtype
    for out in outs[1:]:
        dtype = torch.promote_types(dtype, out.dtype)
    lse_TH = (highest_TH + total_TH.log()).masked_fill(empty_TH, -torch.inf)
    return out_THD.to(dtype), lse_TH
