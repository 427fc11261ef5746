"""Loss as (sum, count): the mean is formed once, over micro-batches, data and context ranks together.

A rank or micro-batch whose tokens are all masked adds (0, 0) and is legal; so is a batch with a single unmasked token.
"""

from __future__ import annotations

import torch

__all__ = ["masked_sum", "position_sums"]


def masked_sum(losses_T: torch.Tensor, mask_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the unmasked per-token losses (fp32 scalar, differentiable) and how many there are (int32 scalar)."""
    kept = torch.where(mask_T > 0, losses_T.float(), 0.0)  # a masked token's loss may be anything, NaN too
    return kept.sum(), (mask_T > 0).sum().to(torch.int32)


def position_sums(
    losses_T: torch.Tensor, mask_T: torch.Tensor, positions_T: torch.Tensor, buckets: int, length: int
) -> torch.Tensor:
    """Loss sums and counts by position in the document, fp64 [2, buckets], of length / buckets positions each."""
    bucket = (positions_T * buckets // length).clamp(max=buckets - 1)
    sums = torch.zeros(2, buckets, dtype=torch.float64, device=losses_T.device)
    kept = mask_T > 0
    sums[0].index_add_(0, bucket, torch.where(kept, losses_T.double(), 0.0))
    sums[1].index_add_(0, bucket, kept.double())
    return sums
