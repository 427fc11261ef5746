"""FlashAttention 4's varlen contract in plain torch, in the dtype of its inputs: what `flash_library` promises."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from moba_train.attention import reference

__all__ = ["backward", "forward"]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    out_PHD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `flash_library.forward`; rows past the last bound hold NaN."""
    out = torch.full_like(q, torch.nan) if out_PHD is None else out_PHD
    lse = q.new_full((q.shape[1], q.shape[0]), torch.nan)
    for rows, columns in _sequences(queries, keys, max_queries, max_keys):
        q_LHD, k_ZGD, v_ZGD = q[rows], k[columns], v[columns]
        mask = torch.ones(len(q_LHD), len(k_ZGD), dtype=torch.bool)
        mask = mask.tril(len(k_ZGD) - len(q_LHD)) if causal else mask
        mask_LHZ = mask[:, None].expand(-1, q.shape[1], -1)
        out[rows], part_lse = reference.masked_attention(q_LHD, k_ZGD, v_ZGD, mask_LHZ, scale)
        lse[:, rows] = part_lse.T
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    causal: bool,
    scale: float,
    deterministic: bool,
    dq_PHD: Tensor | None = None,
    dk_SGD: Tensor | None = None,
    dv_SGD: Tensor | None = None,
    **sizes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `flash_library.backward`, gradients with the strides of their inputs as the library's."""
    assert out is not None or q.shape[1] == 1
    out = torch.zeros_like(q) if out is None else out
    dq = torch.full_like(q, torch.nan) if dq_PHD is None else dq_PHD
    dk, dv = (torch.zeros_like(x) if given is None else given.zero_() for x, given in ((k, dk_SGD), (v, dv_SGD)))
    ratio = q.shape[1] // k.shape[1]
    for rows, columns in _sequences(queries, keys, **sizes):
        k_ZHD, v_ZHD = (x[columns].repeat_interleave(ratio, 1) for x in (k, v))
        scores = torch.einsum("lhd,zhd->hlz", q[rows], k_ZHD) * scale
        if causal:
            seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
            scores = scores.masked_fill(~seen, -torch.inf)
        weights = (scores - lse[:, rows, None]).exp()
        delta = (dout[rows] * out[rows]).sum(-1).T - (0 if dlse is None else dlse[:, rows])
        ds = weights * (torch.einsum("lhd,zhd->hlz", dout[rows], v_ZHD) - delta[..., None]) * scale
        for total, part in ((dk, (ds, q[rows])), (dv, (weights, dout[rows]))):
            total[columns] = torch.einsum("hlz,lhd->zhd", *part).unflatten(1, (-1, ratio)).sum(2)
        dq[rows] = torch.einsum("hlz,zhd->lhd", ds, k_ZHD)  # last: it may be q's memory
    return dq, dk, dv


def _sequences(queries: Tensor, keys: Tensor, max_queries: int, max_keys: int) -> Iterator[tuple[slice, slice]]:
    assert queries[0] == keys[0] == 0
    bounds = zip(pairwise(queries), pairwise(keys), strict=True)
    for (first, last), (key, key_end) in bounds:
        assert 0 <= last - first <= max_queries
        # Without queries too: deterministic, the library counts the tiles of every sequence in memory of this length.
        assert 0 <= key_end - key <= max_keys
        if last > first:
            assert key_end > key, "a sequence with queries has keys"
            yield slice(int(first), int(last)), slice(int(key), int(key_end))
