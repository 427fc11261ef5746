"""The `mixed` backend: MoBA's forward by the Triton kernels, its backward by FlashAttention 4's (flash.py).

Where blocks are of some hundred keys, gathered rows cost the forward more than FlashAttention's products gain.
"""

from __future__ import annotations

from functools import partial

from moba_train.attention import flash

__all__ = ["moba_attention"]

moba_attention = partial(flash.moba_attention, triton_forward=True)
