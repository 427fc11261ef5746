"""Loss as (weighted sum, sum of weights): the mean is formed once, over micro-batches, data and context ranks together.

A weight is 1 in pretraining and what sft.loss_weighting says in fine-tuning; 0 masks a token. A rank or micro-batch
whose tokens are all masked adds (0, 0) and is legal; so is a batch with a single unmasked token.
"""

from __future__ import annotations

import torch

__all__ = ["masked_sum", "position_sums"]


def masked_sum(losses_T: torch.Tensor, weights_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the per-token losses (fp32 scalar, differentiable) and the sum of the weights (fp64 scalar)."""
    # A masked token's loss may be anything, NaN too.
    kept = torch.where(weights_T > 0, losses_T.float(), 0.0) * weights_T
    return kept.sum(), weights_T.double().sum()


def position_sums(
    losses_T: torch.Tensor, weights_T: torch.Tensor, positions_T: torch.Tensor, buckets: int, length: int
) -> torch.Tensor:
    """Weighted loss sums and weights by position in the document, fp64 [2, buckets], of length / buckets positions."""
    bucket = (positions_T * buckets // length).clamp(max=buckets - 1)
    sums = torch.zeros(2, buckets, dtype=torch.float64, device=losses_T.device)
    weights_T = weights_T.double()
    sums[0].index_add_(0, bucket, torch.where(weights_T > 0, losses_T.double(), 0.0) * weights_T)
    sums[1].index_add_(0, bucket, weights_T)
    return sums
