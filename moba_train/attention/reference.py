"""The specification: masked attention over all pairs, O(T * S) in time and memory, and a gate in plain Python.

Written to be read and checked by hand, not to be fast. Every other backend is held to it. fp64 inputs are computed in
fp64, all others in fp32; gradients come from autograd.

Letters: T queries, S held key rows, H query heads, G key heads, D head dim, N blocks, K = top_k picks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moba_train.attention.sequence import SequenceInfo

__all__ = [
    "convolve_keys",
    "full_attention",
    "full_mask",
    "masked_attention",
    "moba_attention",
    "moba_mask",
    "select_from_means",
]


def moba_attention(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, seq: SequenceInfo, picks_THK: Tensor, *, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of the picked blocks at or before each query -> out [T, H, D], lse [T, H]."""
    mask_THS = moba_mask(seq, picks_THK, block_size)
    out_THD, lse_TH = masked_attention(_wide(q_THD), _wide(k_SGD), _wide(v_SGD), mask_THS, scale)
    return out_THD.to(q_THD.dtype), lse_TH


def full_attention(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, seq: SequenceInfo, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over all keys of the document at or before each query -> out [T, H, D], lse [T, H]."""
    mask_THS = full_mask(seq).to(q_THD.device)[:, None].expand(-1, q_THD.shape[1], -1)
    out_THD, lse_TH = masked_attention(_wide(q_THD), _wide(k_SGD), _wide(v_SGD), mask_THS, scale)
    return out_THD.to(q_THD.dtype), lse_TH


def masked_attention(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, mask_THS: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that `mask_THS` shows, in the dtype given. No key shown: out 0 and lse -inf."""
    group = q_THD.shape[1] // k_SGD.shape[1]
    k_SHD, v_SHD = k_SGD.repeat_interleave(group, 1), v_SGD.repeat_interleave(group, 1)
    logits_THS = torch.einsum("thd,shd->ths", q_THD, k_SHD) * scale
    empty_TH = ~mask_THS.any(-1)
    # Rows that see nothing are shown everything, then blanked: no NaN is ever formed.
    logits_THS = logits_THS.masked_fill(~(mask_THS | empty_TH[..., None]), -torch.inf)
    out_THD = torch.einsum("ths,shd->thd", logits_THS.softmax(-1), v_SHD)
    lse_TH = logits_THS.logsumexp(-1)
    return out_THD.masked_fill(empty_TH[..., None], 0.0), lse_TH.masked_fill(empty_TH, -torch.inf)


def full_mask(seq: SequenceInfo) -> Tensor:
    """bool [T, S_held] on the host: key in the query's document and not after it."""
    rows_T, rows_S, document = _rows(seq)
    return (document[rows_T][:, None] == document[rows_S]) & (rows_S <= rows_T[:, None])


def moba_mask(seq: SequenceInfo, picks_THK: Tensor, block_size: int) -> Tensor:
    """bool [T, H, S_held] on the picks' device: key in a picked block and not after the query."""
    table = seq.blocks(block_size)
    block = torch.empty(seq.num_keys, dtype=torch.int64)
    for n, (start, end) in enumerate(zip(table.start_N.tolist(), table.end_N.tolist(), strict=True)):
        block[start:end] = n
    _, rows_S, _ = _rows(seq)
    picked_THS = (picks_THK[..., None] == block[rows_S].to(picks_THK.device)).any(2)
    return picked_THS & full_mask(seq).to(picks_THK.device)[:, None]


@torch.no_grad()
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
) -> Tensor:
    """The gate, one query and head at a time -> int32 [T, H, K]: own block, then by falling score, then -1 pads.

    force_first_block: the first block of the query's document is picked whatever its score. It comes second (first
    where it is the own one) and counts as one of top_k (which must be at least 2). Models trained with full attention
    send what attention they do not need to the first tokens of a context (the attention sink, arXiv 2309.17453), and
    one key of a block hardly shows in its mean.

    force_previous_block: the block right before the query's own, where its document has one, is picked whatever its
    score. It comes behind the first block if that is forced, else second, and counts as one of top_k (which must be at
    least 2, or 3 with both); the others are the best of the blocks left. So a query near the start of its block still
    sees its neighbourhood.

    share_picks_in_group: the query heads of a key head pick together, by the sum of their scores. Scores are linear in
    the query, so it ranks blocks by the group's mean query: of all ways to combine heads the one that costs a single
    dot product a group. Sums and dots run in fp64 and are rounded once, as for any score.
    """
    num_queries, num_heads, _ = q_THD.shape
    group = num_heads // means_NGD.shape[1]
    scores_THN = torch.einsum("thd,nhd->thn", q_THD.double(), means_NGD.double().repeat_interleave(group, 1))
    if share_picks_in_group:
        scores_THN = scores_THN.unflatten(1, (-1, group)).sum(2).repeat_interleave(group, 1)
    scores = (scores_THN if q_THD.dtype == torch.float64 else scores_THN.float()).tolist()
    table = seq.blocks(block_size)
    picks = []
    for t, (first, own) in enumerate(zip(table.first_T.tolist(), table.own_T.tolist(), strict=True)):
        forced = [own]
        if force_first_block and own > first:
            forced.append(first)
        if force_previous_block and own > first and own - 1 not in forced:
            forced.append(own - 1)
        for row in scores[t]:
            ranked = sorted((-row[n], n) for n in range(first, own) if n not in forced)
            chosen = [*forced, *(n for _, n in ranked)][:top_k]
            picks.append([*chosen, *[-1] * (top_k - len(chosen))])
    return torch.tensor(picks, dtype=torch.int32, device=q_THD.device).view(num_queries, num_heads, top_k)


def convolve_keys(k_SGD: Tensor, weight_GDW: Tensor, seq: SequenceInfo) -> Tensor:
    """The key convolution of README.md, one query's key at a time -> [T, G, D] in k's dtype.

    k'_t = k_t + SiLU(sum over lags l < W of weight[l] * k_{t-l}), channel by channel; keys before the document's start
    count as zero (arXiv 2511.11571).
    """
    rows_T, rows_S, document = _rows(seq)
    place = {row: s for s, row in enumerate(rows_S.tolist())}
    keys, weight_GDW = _wide(k_SGD), weight_GDW.to(_wide(k_SGD).dtype)
    out = []
    for t in rows_T.tolist():
        lags = [lag for lag in range(weight_GDW.shape[2]) if t - lag >= 0 and document[t - lag] == document[t]]
        mixed_GD = torch.stack([weight_GDW[..., lag] * keys[place[t - lag]] for lag in lags]).sum(0)
        out.append(keys[place[t]] + torch.nn.functional.silu(mixed_GD))
    # The empty slice keeps the graph, and the shape, where there is no query.
    return torch.cat([keys[:0], *(x[None] for x in out)]).to(k_SGD.dtype)


def _rows(seq: SequenceInfo) -> tuple[Tensor, Tensor, Tensor]:
    """Global row of every query and of every held key, and the document of every global row."""
    every = torch.arange(seq.num_keys)
    document = torch.empty(seq.num_keys, dtype=torch.int64)
    bounds = seq.cu_seqlens.tolist()
    for number, (start, end) in enumerate(pairwise(bounds)):
        document[start:end] = number
    rows_T = every if seq.q_positions is None else seq.q_positions
    rows_S = every if seq.k_positions is None else seq.k_positions
    return rows_T, rows_S, document


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
