"""The one file that knows FlashAttention 4 (`flash_attn.cute`): whether it is there, what it takes, how it is called.

Only its varlen kernels are used, forward and backward apart, because backward must be given a merged lse. A sequence of
L queries and Z keys is causal from the bottom right: query i sees the first Z - L + i + 1 keys.

P query rows, S key rows, H query heads, G key heads, D head dim.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["backward", "forward", "refusal", "refusal_anywhere", "version"]

_DTYPES = (torch.bfloat16, torch.float16)
# 4.0.0b36 on Hopper lays fp32 dq (and dk, dv of grouped heads) out in rows of head dim rounded up to 16 and reads them
# rounded up to 32: gradients of head dims such as 16 or 80 are wrong. Multiples of 32 agree.
_HEAD_DIM_STEP = 32
_MISSING = "needs FlashAttention 4, the package `flash-attn-4`, which cannot be imported"


def refusal(q_THD: Tensor) -> str | None:
    """Why FlashAttention 4 does not serve these queries here, or None where it does."""
    if q_THD.device.type != "cuda":
        return f"needs a GPU, got tensors on {q_THD.device}"
    anywhere = refusal_anywhere(q_THD.dtype, q_THD.shape[2])
    if anywhere is not None:
        return anywhere
    major, _ = torch.cuda.get_device_capability(q_THD.device)
    if major not in (9, 10, 11):
        return "needs a Hopper or Blackwell GPU"
    if major > 9 and q_THD.shape[2] > 128:
        return f"takes head dims up to 128 on this GPU, got {q_THD.shape[2]}"
    return _MISSING if _interface() is None else None


def refusal_anywhere(dtype: torch.dtype, head_dim: int) -> str | None:
    """The part of `refusal` that needs no GPU to tell."""
    if dtype not in _DTYPES:
        return f"computes in bf16 and fp16, got {dtype}"
    if head_dim % _HEAD_DIM_STEP or not 0 < head_dim <= 256:
        return f"takes head dims that are multiples of {_HEAD_DIM_STEP} up to 256, got {head_dim}"
    return None if _installed() else _MISSING


@cache
def _installed() -> bool:
    """Whether the package is there; `flash_attn` alone may be FlashAttention 2."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


def version() -> str | None:
    """The installed version, or None."""
    for name in ("flash-attn-4", "flash_attn_4"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def forward(
    q_PHD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    out_PHD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [P, H, D] and natural-log lse [H, P] of the sequences with int32 bounds `queries` and `keys`.

    Every sequence that has queries has keys. Rows of out past the last bound are not written.
    """
    out_PHD, lse_HP, *_ = _interface()._flash_attn_fwd(
        q_PHD,
        k_SGD,
        v_SGD,
        cu_seqlens_q=queries,
        cu_seqlens_k=keys,
        max_seqlen_q=max_queries,
        max_seqlen_k=max_keys,
        softmax_scale=scale,
        causal=causal,
        return_lse=True,
        out=out_PHD,
    )
    return out_PHD, lse_HP


def backward(
    dout_PHD: Tensor,
    dlse_HP: Tensor | None,
    q_PHD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    out_PHD: Tensor,
    lse_HP: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    deterministic: bool,
    dq_PHD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the inputs' dtype. `out` and `lse` may be those of attention to more keys than these.

    `dq_PHD`, where given, is filled in last: it may be q's own memory.
    """
    return _interface()._flash_attn_bwd(
        q_PHD,
        k_SGD,
        v_SGD,
        out_PHD,
        dout_PHD,
        lse_HP,
        softmax_scale=scale,
        causal=causal,
        cu_seqlens_q=queries,
        cu_seqlens_k=keys,
        max_seqlen_q=max_queries,
        max_seqlen_k=max_keys,
        deterministic=deterministic,
        dlse=dlse_HP,
        dq=dq_PHD,
    )


@cache
def _interface() -> Any:
    """The library's module, whose functions carry no types, or None; early versions have no varlen backward."""
    if not _installed():
        return None
    try:
        module = importlib.import_module("flash_attn.cute.interface")
    except ImportError:
        return None
    return module if "dlse" in inspect.signature(module._flash_attn_bwd).parameters else None
