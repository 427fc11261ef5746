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
import types
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moba_train.attention.lazy import kept

__all__ = ["backward", "forward", "refusal", "refusal_early", "version"]

_DTYPES = (torch.bfloat16, torch.float16)
# 4.0.0b36 on Hopper lays fp32 dq (and dk, dv of grouped heads) out in rows of head dim rounded up to 16 and reads them
# rounded up to 32: gradients of head dims such as 16 or 80 are wrong. Multiples of 32 agree.
_HEAD_DIM_STEP = 32
_HOPPER = 9
_FIRST_KERNEL_KNOWN = ("4.0.0b36",)  # versions whose first backward kernel may be replaced: _backward_of_known_rows
_MISSING = "needs FlashAttention 4, the package `flash-attn-4`, which cannot be imported"
_REFUSALS: dict[tuple[torch.device, torch.dtype, int], str | None] = {}


def refusal(q_THD: Tensor) -> str | None:
    """Why FlashAttention 4 does not serve these queries here, or None where it does."""
    if q_THD.device.type != "cuda":
        return f"needs a GPU, got tensors on {q_THD.device}"
    key = (q_THD.device, q_THD.dtype, q_THD.shape[2])
    return kept(_REFUSALS, key, lambda: _refusal_on_gpu(*key))


def _refusal_on_gpu(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    early = refusal_early(dtype, head_dim, torch.cuda.get_device_capability(device)[0])
    return early or (_MISSING if _interface() is None else None)


def refusal_early(dtype: torch.dtype, head_dim: int, gpu: int | None) -> str | None:
    """The part of `refusal` that no tensor is needed for; gpu: major compute capability, None: not known."""
    if dtype not in _DTYPES:
        return f"computes in bf16 and fp16, got {dtype}"
    if head_dim % _HEAD_DIM_STEP or not 0 < head_dim <= 256:
        return f"takes head dims that are multiples of {_HEAD_DIM_STEP} up to 256, got {head_dim}"
    if gpu is not None and gpu not in (_HOPPER, 10, 11):
        return "needs a Hopper or Blackwell GPU"
    if gpu is not None and gpu > _HOPPER and head_dim > 128:
        return f"takes head dims up to 128 on this GPU, got {head_dim}"
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
    out_PHD: Tensor | None,
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
    dk_SGD: Tensor | None = None,
    dv_SGD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the inputs' dtype, in the given tensors if any; dq is filled in last and may be q's own memory.

    `out` and `lse` may be those of attention to more keys than these. Without `out`, `dlse` is dlse - dout . out, and
    q has one head.
    """
    library = _interface()._flash_attn_bwd
    if out_PHD is None:
        # With out = 0 the library's own dout . out - dlse is right.
        out_PHD = q_PHD.new_zeros(1, *q_PHD.shape[1:]).expand_as(q_PHD)
        library = _backward_of_known_rows() or library
    return library(
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
        dk=dk_SGD,
        dv=dv_SGD,
    )


@cache
def _backward_of_known_rows() -> Any:
    """The library's backward with its first kernel replaced, or None where that kernel is not the one known here.

    The first kernel reads out and dout for a delta that is known, and clears fp32 dq at half of the memory's speed.
    Without it the backward takes 6 % less at blocks of 512 keys (benchmarks/LOG.md, entry 11). Another version may lay
    the padded rows out differently, and nothing would say so: only versions that were tested are taken.
    """
    if version() not in _FIRST_KERNEL_KNOWN:
        return None
    module = _interface()
    whole = module._flash_attn_bwd
    names = {**vars(module), "_bwd_preprocess": _known_rows}
    copy = types.FunctionType(whole.__code__, names, whole.__name__, whole.__defaults__, whole.__closure__)
    copy.__kwdefaults__ = whole.__kwdefaults__
    return copy


def _known_rows(
    out: Tensor,
    dout: Tensor,
    dpsum: Tensor,
    lse: Tensor,
    lse_log2: Tensor,
    dq_accum: Tensor,
    cu_seqlens_q: Tensor,
    seqused_q: None,
    dlse: Tensor,
    dtype: Any,
    head_dim: int,
    head_dim_v: int,
    m_block_size: int,
    *,
    cu_total_m_blocks: Tensor | None,
    fake_mode: bool,
    hdim_multiple_of: int,
) -> None:
    """Stands for the library's `_bwd_preprocess` where there is one head and out is zero."""
    from moba_train.attention.kernels.gather import pad_rows  # late: this file is read where there is no Triton

    pad_rows(lse[0], dlse[0], cu_seqlens_q, lse_log2[0], dpsum[0], m_block_size)
    dq_accum.zero_()


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
