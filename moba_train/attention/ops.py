"""The public ops: input checks, then the choice of backend.

A backend is a module with a function of the op's name; `_BACKENDS` says where, so that it is imported only when used.
`backend="auto"` takes the first entry of `_AUTO` that serves the device and dtype (MoBA on a GPU: first what choice.py
measured as fastest) and logs the choice once; on a GPU it warns when that is a slow path. Nothing here asks the device
for a value.

Letters: T queries, S key rows (held ones under `k_positions`), H query heads, G key heads, D head dim, N blocks,
K = top_k picks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moba_train.attention import choice, flash_library, fused, gate
from moba_train.attention.lazy import load
from moba_train.attention.sequence import SequenceInfo

__all__ = [
    "LARGEST_HEAD_DIM_ON_GPU",
    "convolve_keys",
    "full_attention",
    "moba_attention",
    "select_blocks",
    "select_from_means",
]

_Gate = Callable[..., Tensor]
_Attention = Callable[..., tuple[Tensor, Tensor]]

_LOG = logging.getLogger(__name__)

# op -> backend -> module. The function called is `module.op`, with the signatures of reference.py. What FlashAttention
# has no kernel for, Triton's serve under its name, so that a model is given one name.
_BACKENDS: dict[str, dict[str, str]] = {
    "select_from_means": {
        "reference": "moba_train.attention.reference",
        "portable": "moba_train.attention.gate",
        "triton": "moba_train.attention.kernels.gate",
        "flash": "moba_train.attention.kernels.gate",
        "mixed": "moba_train.attention.kernels.gate",
    },
    "moba_attention": {
        "reference": "moba_train.attention.reference",
        "portable": "moba_train.attention.portable",
        "triton": "moba_train.attention.kernels.moba",
        "flash": "moba_train.attention.flash",
        "mixed": "moba_train.attention.mixed",
    },
    "convolve_keys": {
        "reference": "moba_train.attention.reference",
        "portable": "moba_train.attention.key_conv",
        "triton": "moba_train.attention.kernels.key_conv",
        "flash": "moba_train.attention.kernels.key_conv",
        "mixed": "moba_train.attention.kernels.key_conv",
    },
    "full_attention": {
        "reference": "moba_train.attention.reference",
        "sdpa": "moba_train.attention.dense",
        "flash": "moba_train.attention.flash",
        "triton": "moba_train.attention.kernels.moba",
    },
}
_AUTO: dict[str, dict[str, tuple[str, ...]]] = {
    "select_from_means": {"cpu": ("portable",), "cuda": ("triton", "portable")},
    "moba_attention": {"cpu": ("portable",), "cuda": ("triton", "flash", "mixed", "portable")},
    "convolve_keys": {"cpu": ("portable",), "cuda": ("triton", "portable")},
    "full_attention": {"cpu": ("sdpa",), "cuda": ("flash", "sdpa", "triton", "reference")},
}
_SLOW_ON_GPU = ("reference", "portable")  # these alone compute fp64 there
_ATOMICS_ON_GPU = ("reference", "portable", "sdpa")  # their gradients may differ from run to run there
LARGEST_HEAD_DIM_ON_GPU = 256  # of Triton's kernels, and of PyTorch's in 16 bits
_NAMES = ("auto", "reference", "portable", "sdpa", "triton", "flash", "mixed")
_logged: set[tuple[str, str, torch.device, torch.dtype]] = set()


def select_blocks(
    q_THD: Tensor,
    k_SGD: Tensor,
    seq: SequenceInfo,
    *,
    block_size: int,
    top_k: int,
    force_first_block: bool = False,
    force_previous_block: bool = False,
    share_picks_in_group: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Blocks each query attends to (arXiv 2502.13189, eq. 5-6) -> int32 [T, H, K].

    Order: the query's own block, the best top_k - 1 earlier blocks of its document by falling score (ties to the lower
    id), then -1 where there are not enough. No gradient flows.

    Args:
        force_first_block: the document's first block comes second whatever its score, and counts as one of top_k.
        force_previous_block: the same of the block before the own one; it comes behind the first block, if both are.
        share_picks_in_group: the heads of a key head pick together, by the sum of their scores.

    Raises:
        ValueError: mismatched inputs, `k_positions` (a gate over part of the keys would pick wrongly), or top_k less
            than what is forced.
    """
    _check_inputs(q_THD, k_SGD, None, seq)
    _check_sizes(block_size, top_k, 1 + force_first_block + force_previous_block)
    means_NGD = gate.block_means(k_SGD, seq, block_size)
    return select_from_means(
        q_THD,
        means_NGD,
        seq,
        block_size=block_size,
        top_k=top_k,
        force_first_block=force_first_block,
        force_previous_block=force_previous_block,
        share_picks_in_group=share_picks_in_group,
        backend=backend,
    )


def select_from_means(
    q_THD: Tensor,
    means_NGD: Tensor,
    seq: SequenceInfo,
    *,
    block_size: int,
    top_k: int,
    force_first_block: bool = False,
    force_previous_block: bool = False,
    share_picks_in_group: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`select_blocks` for given means of all N blocks of the batch, [N, G, D] -> int32 [T, H, K].

    Raises:
        ValueError: mismatched inputs, or top_k too small for what is forced.
    """
    _check_sizes(block_size, top_k, 1 + force_first_block + force_previous_block)
    _check_queries(q_THD, seq)
    num_blocks = seq.blocks(block_size).num_blocks
    if means_NGD.dim() != 3 or means_NGD.shape[0] != num_blocks or means_NGD.shape[2] != q_THD.shape[2]:
        raise ValueError(
            f"means must be [{num_blocks} blocks, key heads, {q_THD.shape[2]}] for block_size {block_size}, "
            f"got {list(means_NGD.shape)}"
        )
    _check_heads(q_THD, means_NGD)
    select: _Gate = _function("select_from_means", backend, q_THD)
    options = {
        "force_first_block": force_first_block,
        "force_previous_block": force_previous_block,
        "share_picks_in_group": share_picks_in_group,
    }
    return select(q_THD, means_NGD, seq, block_size=block_size, top_k=top_k, **options)


def moba_attention(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    seq: SequenceInfo,
    *,
    block_size: int,
    top_k: int,
    softmax_scale: float | None = None,
    force_first_block: bool = False,
    force_previous_block: bool = False,
    share_picks_in_group: bool = False,
    picks: Tensor | None = None,
    backend: str = "auto",
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention to the picked blocks -> out [T, H, D] and natural-log lse [T, H] (fp32; fp64 for fp64 inputs).

    Args:
        softmax_scale: default 1 / sqrt(D).
        force_first_block, force_previous_block, share_picks_in_group: how blocks are selected, as in `select_blocks`.
        picks: int32 [T, H, K] as `select_blocks` returns them, whatever the options above; default: selected here.
            Required with `k_positions`. No block may be twice in a row: not checked, it would count twice, and the
            lists of `flash` could outgrow what its library is told.
        backend: "auto", "reference", "portable", "triton", "flash" or "mixed" (triton forward, flash backward).
        deterministic: gradients bitwise equal from run to run, at some cost; None asks
            `torch.use_deterministic_algorithms`. On a GPU the kernels alone can.

    A query that sees no held key has out 0, lse -inf and zero gradient. Without `picks`, where top_k blocks cover every
    document this is full attention, and every backend but the reference may answer with that.

    Raises:
        ValueError: mismatched inputs, `k_positions` without `picks`, or a backend that is absent or not deterministic.
    """
    _check_inputs(q_THD, k_SGD, v_SGD, seq)
    _check_sizes(block_size, top_k, 1 + force_first_block + force_previous_block)
    first = None
    if backend == "auto":  # kept, as a compiled model cannot search the table
        sizes = (block_size, seq.max_document, seq.num_queries)
        first = seq.once(("backend", block_size), lambda: choice.moba_backend(*sizes))
    attend = _attention("moba_attention", backend, q_THD, deterministic, first=first)
    if picks is None:
        if seq.k_positions is not None:
            raise ValueError(
                "k_positions holds part of the keys, so blocks cannot be scored here; "
                "pass picks from select_from_means over the means of all blocks"
            )
        if top_k * block_size >= seq.max_document and backend != "reference":
            return full_attention(q_THD, k_SGD, v_SGD, seq, softmax_scale=softmax_scale, deterministic=deterministic)
        picks = select_blocks(
            q_THD,
            k_SGD,
            seq,
            block_size=block_size,
            top_k=top_k,
            force_first_block=force_first_block,
            force_previous_block=force_previous_block,
            share_picks_in_group=share_picks_in_group,
            backend=backend,
        )
    expected = (*q_THD.shape[:2], top_k)
    if picks.shape != expected or picks.dtype != torch.int32 or picks.device != q_THD.device:
        raise ValueError(
            f"picks must be int32 {list(expected)} (queries, heads, top_k) on {q_THD.device}, "
            f"got {picks.dtype} {list(picks.shape)} on {picks.device}"
        )
    scale = _scale(softmax_scale, q_THD)
    return attend(q_THD, k_SGD, v_SGD, seq, picks, block_size=block_size, scale=scale)


def full_attention(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    seq: SequenceInfo,
    *,
    softmax_scale: float | None = None,
    backend: str = "auto",
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within each document -> out [T, H, D] and natural-log lse [T, H] (fp32; fp64 for fp64 inputs).

    Args:
        softmax_scale: default 1 / sqrt(D).
        backend: "auto", "reference", "sdpa", "flash" or "triton".
        deterministic: as in `moba_attention`.

    Raises:
        ValueError: mismatched inputs, or a backend that is absent or not deterministic.
    """
    _check_inputs(q_THD, k_SGD, v_SGD, seq)
    attend = _attention("full_attention", backend, q_THD, deterministic)
    return attend(q_THD, k_SGD, v_SGD, seq, scale=_scale(softmax_scale, q_THD))


def convolve_keys(k_SGD: Tensor, weight_GDW: Tensor, seq: SequenceInfo, *, backend: str = "auto") -> Tensor:
    """Short causal depthwise convolution over the keys of each document (arXiv 2511.11571) -> [T, G, D] in k's dtype.

    k'_t = k_t + SiLU(sum over l < W of weight[l] * k_{t-l}); keys before the document count as zero, and zero weights
    leave every key as it is. Sums run in fp32 (fp64 for fp64 keys). Rows of the result are those of the queries: with
    `q_positions` and `k_positions` a decoder convolves the keys of new tokens from them and the last W - 1 before.

    Args:
        weight_GDW: floating point; W >= 1 weights for each channel of each key head, lag 0 first.
        backend: "auto", "reference", "portable" or "triton".

    Raises:
        ValueError: mismatched inputs, held keys that lack one that a query's key needs, or a backend that is not there.
    """
    if k_SGD.dim() != 3 or k_SGD.shape[0] != seq.num_held or not k_SGD.dtype.is_floating_point:
        raise ValueError(
            f"k must be floating point [{seq.num_held} held keys, key heads, head dim], got {k_SGD.dtype} "
            f"{list(k_SGD.shape)} ({seq!r})"
        )
    fits = weight_GDW.dim() == 3 and weight_GDW.shape[:2] == k_SGD.shape[1:] and weight_GDW.shape[2] >= 1
    if not fits or not weight_GDW.dtype.is_floating_point or weight_GDW.device != k_SGD.device:
        raise ValueError(
            f"weight must be floating point [{k_SGD.shape[1]} key heads, {k_SGD.shape[2]}, width] on {k_SGD.device}, "
            f"got {weight_GDW.dtype} {list(weight_GDW.shape)} on {weight_GDW.device}"
        )
    seq.window(weight_GDW.shape[2], k_SGD.device)  # refuses held keys that are too few
    convolve: Callable[..., Tensor] = _function("convolve_keys", backend, k_SGD)
    return convolve(k_SGD, weight_GDW, seq)


def _attention(
    op: str, backend: str, q_THD: Tensor, deterministic: bool | None, *, first: str | None = None
) -> _Attention:
    """The function of the backend; kernels are told whether to be deterministic, the others are refused on a GPU."""
    on_gpu = q_THD.device.type != "cpu"
    # Torch's own switch steers "auto"; who names another backend has to ask here to be refused.
    heeded = (
        torch.are_deterministic_algorithms_enabled() if deterministic is None and backend == "auto" else deterministic
    )
    name = _choose(op, backend, q_THD, first=first, avoid=_ATOMICS_ON_GPU if heeded and on_gpu else ())
    if deterministic and on_gpu and name in _ATOMICS_ON_GPU:
        raise ValueError(
            f"deterministic gradients of {op} on {q_THD.device} in {q_THD.dtype} come from backends triton, flash and "
            f"mixed, not {name}"
        )
    attend: _Attention = _load(op, name)
    return attend if name in _ATOMICS_ON_GPU else partial(attend, deterministic=deterministic)


def _function(op: str, backend: str, q_THD: Tensor) -> Callable[..., Any]:
    return _load(op, _choose(op, backend, q_THD))


def _load(op: str, name: str) -> Callable[..., Any]:
    return load(_BACKENDS[op][name], op)


def _choose(op: str, backend: str, q_THD: Tensor, *, first: str | None = None, avoid: tuple[str, ...] = ()) -> str:
    """The backend's name; under "auto" `first`, if it serves these queries, else the first that does."""
    if backend == "auto":
        kind = "cpu" if q_THD.device.type == "cpu" else "cuda"
        any_dtype = kind == "cpu" or q_THD.dtype != torch.float64
        names = [n for n in _AUTO[op][kind] if (any_dtype or n in _SLOW_ON_GPU) and _serves(n, q_THD)]
        names = [n for n in names if n not in avoid] or names
        name = first if first in names else names[0]
        _log_choice(op, name, q_THD)
    elif backend in _BACKENDS[op]:
        name = backend
    else:
        known = ", ".join(["auto", *_BACKENDS[op]])
        what = "does not serve" if backend in _NAMES else "is not a backend of"
        raise ValueError(f"backend {backend!r} {what} {op}; choose one of: {known}")
    return name


def _serves(name: str, q_THD: Tensor) -> bool:
    if name in ("flash", "mixed"):
        return flash_library.refusal(q_THD) is None
    unlimited = name in _SLOW_ON_GPU or (name == "sdpa" and q_THD.dtype == torch.float32)
    return unlimited or q_THD.device.type == "cpu" or q_THD.shape[2] <= LARGEST_HEAD_DIM_ON_GPU


def _log_choice(op: str, name: str, q_THD: Tensor) -> None:
    key = (op, name, q_THD.device, q_THD.dtype)
    if key in _logged:
        return
    _logged.add(key)
    slow = q_THD.device.type != "cpu" and name in _SLOW_ON_GPU
    note = ", a slow path on this device: no kernel serves it" if slow else ""
    if name == "sdpa":
        note = f": {fused.describe(q_THD)}"
    _LOG.log(
        logging.WARNING if slow else logging.INFO,
        "%s on %s in %s uses backend %r%s",
        op,
        q_THD.device,
        q_THD.dtype,
        name,
        note,
    )


def _scale(softmax_scale: float | None, q_THD: Tensor) -> float:
    return q_THD.shape[2] ** -0.5 if softmax_scale is None else softmax_scale


def _check_sizes(block_size: int, top_k: int, forced: int) -> None:
    for name, value in (("block_size", block_size), ("top_k", top_k)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if top_k < forced:
        raise ValueError(f"{forced} blocks are picked whatever their score, the own one among them: top_k is too small")


def _check_queries(q_THD: Tensor, seq: SequenceInfo) -> None:
    if q_THD.dim() != 3:
        raise ValueError(f"q must be [queries, heads, head dim], got {list(q_THD.shape)}; flatten batch into documents")
    if not q_THD.dtype.is_floating_point:
        raise ValueError(f"q must be floating point, got {q_THD.dtype}")
    if q_THD.shape[0] != seq.num_queries:
        raise ValueError(f"q has {q_THD.shape[0]} rows but the sequence has {seq.num_queries} queries ({seq!r})")


def _check_heads(q_THD: Tensor, k_SGD: Tensor) -> None:
    if k_SGD.shape[1] == 0 or q_THD.shape[1] % k_SGD.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads, got {q_THD.shape[1]} and {k_SGD.shape[1]}")
    if k_SGD.device != q_THD.device:
        raise ValueError(f"inputs must share a device, got q on {q_THD.device} and keys on {k_SGD.device}")


def _check_inputs(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor | None, seq: SequenceInfo) -> None:
    _check_queries(q_THD, seq)
    if k_SGD.dim() != 3 or k_SGD.shape[0] != seq.num_held or k_SGD.shape[2] != q_THD.shape[2]:
        raise ValueError(
            f"k must be [{seq.num_held} held keys, key heads, {q_THD.shape[2]}], got {list(k_SGD.shape)} ({seq!r})"
        )
    _check_heads(q_THD, k_SGD)
    if v_SGD is not None and (v_SGD.shape != k_SGD.shape or v_SGD.device != k_SGD.device):
        raise ValueError(
            f"v must match k, got {list(v_SGD.shape)} on {v_SGD.device} and {list(k_SGD.shape)} on {k_SGD.device}"
        )
    dtypes = {tensor.dtype for tensor in (q_THD, k_SGD, v_SGD) if tensor is not None}
    if len(dtypes) > 1:
        raise ValueError(f"q, k and v must share a dtype, got {sorted(map(str, dtypes))}; cast them alike")
