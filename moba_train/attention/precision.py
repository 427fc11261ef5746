"""In which precision attention adds up."""

from __future__ import annotations

import torch

__all__ = ["accumulator"]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp64 for inputs of fp64, else fp32: of scores, softmax, lse and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32
