"""The key convolution in vectorised torch, for any device: shifted products, gradients from autograd.

Letters: T queries, S held key rows, G key heads, D head dim, W width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad, silu

from moba_train.attention.precision import accumulator
from moba_train.attention.sequence import SequenceInfo

__all__ = ["convolve_keys"]


def convolve_keys(k_SGD: Tensor, weight_GDW: Tensor, seq: SequenceInfo) -> Tensor:
    """k plus SiLU of its causal convolution within each document, at the queries' rows -> [T, G, D] in k's dtype."""
    window = seq.window(weight_GDW.shape[2], k_SGD.device)
    wide = accumulator(k_SGD.dtype)
    keys_SGD, weight_GDW = k_SGD.to(wide), weight_GDW.to(wide)
    mixed_SGD = keys_SGD * weight_GDW[..., 0]
    for lag in range(1, min(weight_GDW.shape[2], len(k_SGD))):
        foreign_S11 = (window.reach_S < lag)[:, None, None]
        # Filled, not multiplied: a NaN of another document must not pass.
        earlier_SGD = pad(keys_SGD[:-lag], (0, 0, 0, 0, lag, 0)).masked_fill(foreign_S11, 0.0)
        mixed_SGD = mixed_SGD + earlier_SGD * weight_GDW[..., lag]
    out_SGD = (keys_SGD + silu(mixed_SGD)).to(k_SGD.dtype)
    return out_SGD if seq.num_queries == seq.num_held else out_SGD.index_select(0, window.row_T)
