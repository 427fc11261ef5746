"""Rotary position embedding from explicit positions, with Hugging Face's scaling kinds.

megatron-core's own rotary code assumes a layout; rotating from each token's position serves any document length, any
context-parallel layout and every scaling kind without asking the device for a size. Halves convention (Llama):
dimension i turns with dimension i + D/2. Letters: T tokens, H heads, D head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from moba_train.config.schema import ModelConfig

__all__ = ["inverse_frequencies", "rotary_table", "rotate"]


def inverse_frequencies(model: ModelConfig) -> torch.Tensor:
    """Angle per position of each dimension pair, fp64 [D/2], scaling applied (RoFormer, section 3.2.2).

    linear: all frequencies divided by `factor` (position interpolation, arXiv 2306.15595). llama3: low frequencies
    divided, high ones kept, a linear blend between (Llama 3.1).
    """
    scaling = model.rope_scaling
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
    frequencies = model.rope_base**-exponents
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "llama3":
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = keep.clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / scaling.factor
    assert scaling.rope_type == "default", scaling.rope_type
    return frequencies


def rotary_table(positions_T: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [T, 1, D/2], of each token's angles; computed once a micro-batch and shared by all layers.

    Angles are formed in fp64: at a million positions fp32 loses them to 1e-1 radians.
    """
    angles = positions_T.to(torch.float64)[:, None, None] * frequencies.to(positions_T.device)
    return angles.cos().float(), angles.sin().float()


def rotate(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x turned by the table's angles; computed in fp32, returned in x's dtype. Saves only the table for backward."""
    return _Rotate.apply(x_THD, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_THD, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None


def _turn(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x_THD.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THD.dtype)
