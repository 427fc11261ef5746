"""The MoBA gate: block means -> scores -> causal candidates -> top-k. No parameters, no gradient.

Score of query q (head h) for block i is q . mean(K over block i), K after rotary embedding (arXiv 2502.13189, section
2.2, eq. 5-6). The query's own block is always picked and counts as one of top_k; the others are the best top_k - 1
blocks strictly before it in the same document, ties to the lower block id. Three options, off by default, change which
these are; reference.py defines them.

Sums and dots run in fp64 and are rounded to fp32 once. So a mean does not depend on the order in which its rows are
visited, nor a score on how queries are cut into tiles or ranks, and neither TF32 nor autocast can touch them. (For fp64
inputs nothing is rounded.)

Letters: T queries, S key rows (held ones under `k_positions`), H query heads, G key heads, R = H // G, D head dim,
N blocks, K = top_k picks, n candidate blocks of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_train.attention.lazy import load
from moba_train.attention.precision import accumulator
from moba_train.attention.sequence import BlockTable, SequenceInfo

__all__ = ["block_means", "block_sums", "means_from_sums", "select_from_means", "with_first_block"]

# Elements of the largest temporary: fits a CPU's cache, fills a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}


@torch.no_grad()
def block_sums(k_SGD: Tensor, seq: SequenceInfo, block_size: int) -> Tensor:
    """fp64 sums of the held rows of every block -> [N, G, D].

    With `k_positions` these are partial sums: added over the holders of all rows they are the sums of the whole blocks.
    """
    if k_SGD.device.type == "cuda":
        return load("moba_train.attention.kernels.gate", "block_sums")(k_SGD, seq, block_size)
    table = seq.blocks(block_size)
    blocks = table.on(k_SGD.device)
    _, num_key_heads, head_dim = k_SGD.shape
    k_SX = k_SGD.detach().reshape(seq.num_held, num_key_heads * head_dim)
    sums_NX = k_SX.new_zeros(table.num_blocks, k_SX.shape[1], dtype=torch.float64)
    lengths_N = blocks.held_end_N - blocks.held_start_N
    ids = torch.arange(table.num_blocks, device=k_SGD.device)
    block_S = ids.repeat_interleave(lengths_N, output_size=seq.num_held)
    step = max(1, 16 * _chunk_elements(k_SGD) // max(1, k_SX.shape[1]))
    for row in range(0, seq.num_held, step):
        sums_NX.index_add_(0, block_S[row : row + step], k_SX[row : row + step].double())
    return sums_NX.view(table.num_blocks, num_key_heads, head_dim)


def means_from_sums(sums_NGD: Tensor, seq: SequenceInfo, block_size: int, dtype: torch.dtype) -> Tensor:
    """Means of whole blocks from their whole fp64 sums; `dtype` is that of k. fp32, or fp64 for fp64 keys."""
    blocks = seq.blocks(block_size).on(sums_NGD.device)
    means_NGD = sums_NGD / (blocks.end_N - blocks.start_N)[:, None, None]
    return means_NGD.to(accumulator(dtype))


def block_means(k_SGD: Tensor, seq: SequenceInfo, block_size: int) -> Tensor:
    """Mean key of every block -> fp32 [N, G, D] (fp64 for fp64 keys).

    Raises:
        ValueError: if `seq` holds only part of the keys; sum the parts with `block_sums` and use `means_from_sums`.
    """
    if seq.k_positions is not None:
        raise ValueError(
            f"block means need all {seq.num_keys} keys but k_positions holds {seq.num_held}; "
            "add up block_sums over all holders and call means_from_sums"
        )
    return means_from_sums(block_sums(k_SGD, seq, block_size), seq, block_size, k_SGD.dtype)


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
    """Pick blocks given all block means -> int32 [T, H, K]: forced blocks, then by falling score, then -1 pads."""
    forced, dtype = 1 + force_previous_block, q_THD.dtype
    table, scored = seq.blocks(block_size, skip_first=force_first_block), top_k - force_first_block
    if share_picks_in_group:
        group = q_THD.shape[1] // means_NGD.shape[1]
        q_TGD = q_THD.double().unflatten(1, (-1, group)).sum(2)
        picks_THK = _select(q_TGD, means_NGD, table, scored, forced, dtype).repeat_interleave(group, 1)
    else:
        picks_THK = _select(q_THD, means_NGD, table, scored, forced, dtype)
    return with_first_block(picks_THK, seq, block_size) if force_first_block else picks_THK


def with_first_block(picks_THK: Tensor, seq: SequenceInfo, block_size: int) -> Tensor:
    """Picks among the blocks behind each document's first -> [T, H, K + 1] with the first in second place; a query in
    the first block itself has no other."""
    blocks = seq.blocks(block_size).on(picks_THK.device)
    first_T = torch.where(blocks.own_T > blocks.first_T, blocks.first_T, -1).to(picks_THK.dtype)
    first_TH1 = first_T[:, None, None].expand(-1, picks_THK.shape[1], 1)
    return torch.cat([picks_THK[..., :1], first_TH1, picks_THK[..., 1:]], dim=-1)


def _select(q_THD: Tensor, means_NGD: Tensor, table: BlockTable, top_k: int, forced: int, dtype: torch.dtype) -> Tensor:
    """The `forced` blocks that end with the query's own, then the best others; scores rounded as for `dtype`."""
    blocks = table.on(q_THD.device)
    num_queries, num_heads, head_dim = q_THD.shape
    num_key_heads = means_NGD.shape[1]
    picks_THK = torch.full((num_queries, num_heads, top_k), -1, dtype=torch.int32, device=q_THD.device)
    picks_THK[:, :, 0] = blocks.own_T[:, None]
    if forced == 2:
        has_previous_T = blocks.own_T > blocks.first_T
        picks_THK[:, :, 1] = torch.where(has_previous_T, blocks.own_T - 1, -1)[:, None]
    if top_k == forced or num_queries == 0:
        return picks_THK

    means_GDN = means_NGD.double().permute(1, 2, 0).contiguous()
    most_candidates = int((table.own_T - table.first_T).max())
    step = max(1, _chunk_elements(q_THD) // (num_heads * max(1, most_candidates)))
    for begin in range(0, num_queries, step):
        end = min(begin + step, num_queries)
        # Both bounds grow with the query, so one window of blocks serves the chunk.
        low, high = int(table.first_T[begin]), int(table.own_T[end - 1]) - (forced - 1)
        if low >= high:
            continue
        q_GCRD = q_THD[begin:end].double().reshape(end - begin, num_key_heads, -1, head_dim).permute(1, 0, 2, 3)
        scores_GXn = torch.bmm(q_GCRD.reshape(num_key_heads, -1, head_dim), means_GDN[:, :, low:high])
        scores_GCRn = scores_GXn.to(accumulator(dtype)).view(num_key_heads, end - begin, -1, high - low)
        first_C, stop_C = blocks.first_T[begin:end] - low, blocks.own_T[begin:end] - (forced - 1) - low
        ids_n = torch.arange(high - low, device=q_THD.device)
        outside_Cn = (ids_n < first_C[:, None]) | (ids_n >= stop_C[:, None])
        take = min(top_k - forced, high - low)
        best_GCRK = _top_ids(scores_GCRn, outside_Cn[None, :, None], take)
        # Candidates sort before all else, so the first (stop - first) picks are the real ones.
        rank_K = torch.arange(take, device=q_THD.device)
        spare_CK = rank_K >= (stop_C - first_C)[:, None]
        best_GCRK = (best_GCRK + low).masked_fill_(spare_CK[None, :, None], -1)
        picks_THK[begin:end, :, forced : forced + take] = best_GCRK.permute(1, 0, 2, 3).reshape(
            end - begin, num_heads, take
        )
    return picks_THK


def _chunk_elements(tensor: Tensor) -> int:
    return _CHUNK_ELEMENTS["cpu" if tensor.device.type == "cpu" else "cuda"]


def _top_ids(scores_Xn: Tensor, outside_Xn: Tensor, take: int) -> Tensor:
    """Indices of the `take` largest, falling, ties to the lower index (which `topk` alone does not promise)."""
    if scores_Xn.dtype == torch.float64:
        scores_Xn = scores_Xn.masked_fill(outside_Xn, -torch.inf)
        return scores_Xn.sort(dim=-1, descending=True, stable=True).indices[..., :take]
    # Bits of a float order like an integer once negatives are flipped; + 0.0 makes -0.0 equal to 0.0.
    bits = (scores_Xn + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids_n = torch.arange(scores_Xn.shape[-1], device=scores_Xn.device)
    keys_Xn = (ordered.long() << 32) - ids_n
    # Masked as a key, below every bit pattern: even a NaN score cannot let a foreign block in.
    return keys_Xn.masked_fill_(outside_Xn, torch.iinfo(torch.int64).min).topk(take, dim=-1).indices
