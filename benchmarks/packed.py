"""Packed documents that the benchmarks share."""

from __future__ import annotations

import math

import torch

__all__ = ["log_normal"]


def log_normal(length: int, mean: float = 8192, sigma: float = 1.5) -> list[int]:
    """Bounds of documents of log-normal lengths that fill `length` rows; the last is cut."""
    generator = torch.Generator().manual_seed(0)
    bounds = [0]
    while bounds[-1] < length:
        document = (torch.randn((), generator=generator) * sigma + math.log(mean) - sigma**2 / 2).exp()
        bounds.append(min(length, bounds[-1] + max(1, int(document))))
    return bounds
