"""Copies between tensors whose rows lie apart, 8 bytes at a time.

PyTorch copies such tensors element by element, one a thread: 1.3 to 1.5 TB/s in bf16 on an H100, where contiguous ones
reach 2.9. Seen as words of 8 bytes the same rows make a quarter of the elements. Bits are moved, never changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["contiguous", "copy_into"]

_WORD = torch.int64


def contiguous(x: Tensor) -> Tensor:
    """`x.contiguous()`."""
    return x if x.is_contiguous() else _words(x).contiguous().view(x.dtype)


def copy_into(total: Tensor, x: Tensor) -> None:
    """`total.copy_(x)`."""
    wide_total, wide = _words(total), _words(x)
    if total.dtype == x.dtype and wide_total.dtype == wide.dtype:
        wide_total.copy_(wide)
    else:
        total.copy_(x)


def _words(x: Tensor) -> Tensor:
    """The same memory as words, or `x` itself where its rows are no whole words."""
    ratio = _WORD.itemsize // x.element_size()
    whole = (x.storage_offset(), *x.shape[-1:], *x.stride()[:-1])
    fits = x.dim() > 0 and x.stride(-1) == 1 and not any(number % ratio for number in whole)
    return x.view(_WORD) if fits else x
