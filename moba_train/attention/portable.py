"""MoBA attention in vectorised torch for any device: what a CPU trains with.

A *pair* is one query row (query, head) and one picked block. Pairs are sorted by (key head, block) and cut into tiles
of M pairs that share a block, so a chunk of tiles is three batched products: scores, and two with the probabilities.
Partial results of a row's K pairs are merged by log-sum-exp. Heads of one group share tiles: K and V stay unexpanded.

Memory: the largest temporaries hold one chunk of scores, or the D-wide partials of one slice of queries (K per row).
Sizes of lists are read only on a CPU, where that is free; elsewhere an upper bound serves and nothing waits.

Letters: T queries, S held key rows, H query heads, G key heads, D head dim, N blocks, K picks, P pairs, X tiles of
M pairs, Y = X * M + 1 slots, W key columns of a chunk, Q = T * H query rows.
C = S * G key rows: (s, g) is row s * G + g.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moba_train.attention.precision import accumulator
from moba_train.attention.sequence import SequenceInfo

__all__ = ["moba_attention"]

_TILES = (16, 128)  # fewest and most pairs of a tile
_LN_2 = math.log(2.0)
# Elements of one chunk of scores, and of the partials of one slice of queries.
_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
_SLICE_ELEMENTS = {"cpu": 2**26, "cuda": 2**29}


def moba_attention(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, seq: SequenceInfo, picks_THK: Tensor, *, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of the picked blocks at or before each query -> out [T, H, D], lse [T, H]."""
    return _MobaAttention.apply(q_THD, k_SGD, v_SGD, picks_THK, seq, block_size, scale)


class _MobaAttention(torch.autograd.Function):
    """Saves its inputs and outputs only; pairs are sorted and scores formed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGD: Tensor,
        picks_THK: Tensor,
        seq: SequenceInfo,
        block_size: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out_THD, lse_TH = _forward(q_THD, k_SGD, v_SGD, seq, picks_THK, block_size, scale)
        ctx.save_for_backward(q_THD, k_SGD, v_SGD, out_THD, lse_TH, picks_THK)
        ctx.settings = (seq, block_size, scale)
        return out_THD, lse_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor | None, dlse_TH: Tensor | None) -> tuple[Tensor | None, ...]:
        q_THD, k_SGD, v_SGD, out_THD, lse_TH, picks_THK = ctx.saved_tensors
        grads = _backward(dout_THD, dlse_TH, q_THD, k_SGD, v_SGD, out_THD, lse_TH, picks_THK, *ctx.settings)
        return (*grads, None, None, None, None)


class _Tiles(NamedTuple):
    """One slice of pairs cut into tiles. Padding of a tile has row 0 and sees nothing."""

    slot_P: Tensor  # where the pair lies among the X * M slots; X * M for a pair that sees nothing
    row_XM: Tensor
    visible_XM: Tensor  # how many of the block's held keys the row sees
    start_X: Tensor  # first held row of the tile's block
    head_X: Tensor  # its key head
    chunks: list[tuple[int, int, int, bool]]  # first tile, last tile, key columns, whether columns must be masked


def _forward(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, seq: SequenceInfo, picks_THK: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    num_queries, num_heads, head_dim = q_THD.shape
    top_k = picks_THK.shape[2]
    wide = accumulator(q_THD.dtype)
    out_THD = torch.zeros_like(q_THD, memory_format=torch.contiguous_format)
    lse_TH = q_THD.new_full((num_queries, num_heads), -torch.inf, dtype=wide)
    q_QD, k_CD, v_CD = (tensor.reshape(-1, head_dim) for tensor in (q_THD, k_SGD, v_SGD))
    for begin, end in _slices(seq, picks_THK, head_dim):
        tiles = _cut(picks_THK[begin:end], begin, seq, block_size, k_SGD.shape[1])
        num_slots = tiles.row_XM.numel()
        # One slot more, for the pairs that see nothing: their weight is 0 and so must be what it multiplies.
        acc_YD = q_THD.new_empty(num_slots + 1, head_dim, dtype=wide)
        sum_Y = q_THD.new_empty(num_slots + 1, dtype=wide)
        max_Y = q_THD.new_empty(num_slots + 1, dtype=wide)
        acc_YD[-1:].zero_()
        sum_Y[-1:].zero_()
        max_Y[-1:].fill_(-torch.inf)
        for x, y, width, masked in tiles.chunks:
            slots = slice(x * tiles.row_XM.shape[1], y * tiles.row_XM.shape[1])
            keys_XW = _key_rows(tiles, x, y, width, k_SGD)
            q_XMD, k_XWD = _gather(q_QD, tiles.row_XM[x:y]), _gather(k_CD, keys_XW)
            scores_XMW = _scores(q_XMD, k_XWD, tiles.visible_XM[x:y] if masked else None, scale)
            # The floor keeps rows that see nothing from inf - inf.
            max_XM = scores_XMW.amax(-1).clamp_(min=torch.finfo(wide).min)
            prob_XMW = scores_XMW.sub_(max_XM[..., None]).exp2_()
            acc_YD[slots] = _product(prob_XMW.to(q_XMD.dtype), _gather(v_CD, keys_XW)).flatten(0, 1)
            sum_Y[slots] = prob_XMW.sum(-1).flatten()
            max_Y[slots] = max_XM.flatten()
        shape = (end - begin, num_heads, top_k)
        max_THK, sum_THK = (tensor[tiles.slot_P].view(shape) for tensor in (max_Y, sum_Y))
        highest_TH1 = max_THK.amax(-1, keepdim=True).clamp_(min=torch.finfo(wide).min)
        weight_THK = (max_THK - highest_TH1).exp2_()
        total_TH1 = (weight_THK * sum_THK).sum(-1, keepdim=True)
        lse_TH[begin:end] = (highest_TH1 + total_TH1.log2()).mul_(_LN_2).squeeze(-1)
        weight_THK /= total_TH1.masked_fill_(total_TH1 == 0, 1.0)
        acc_THKD = acc_YD.index_select(0, tiles.slot_P).view(*shape, head_dim)
        out_THD[begin:end] = acc_THKD.mul_(weight_THK[..., None]).sum(2)
    return out_THD, lse_TH


def _backward(
    dout_THD: Tensor | None,
    dlse_TH: Tensor | None,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    out_THD: Tensor,
    lse_TH: Tensor,
    picks_THK: Tensor,
    seq: SequenceInfo,
    block_size: int,
    scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if dout_THD is None and dlse_TH is None:
        return None, None, None
    head_dim, wide = q_THD.shape[2], accumulator(q_THD.dtype)
    if dout_THD is None:
        dout_THD = torch.zeros_like(out_THD)
    # d lse / d score = p, so its gradient only shifts delta: ds = p * (dp - (dout . out - dlse)).
    delta_TH = (dout_THD.to(wide) * out_THD).sum(-1)
    if dlse_TH is not None:
        delta_TH -= dlse_TH
    q_QD, k_CD, v_CD, dout_QD = (tensor.reshape(-1, head_dim) for tensor in (q_THD, k_SGD, v_SGD, dout_THD))
    lse_Q, delta_Q = lse_TH.flatten() / _LN_2, delta_TH.flatten()
    dq_QD, dk_CD, dv_CD = (torch.zeros_like(tensor, dtype=wide) for tensor in (q_QD, k_CD, v_CD))
    for begin, end in _slices(seq, picks_THK, head_dim):
        tiles = _cut(picks_THK[begin:end], begin, seq, block_size, k_SGD.shape[1])
        for x, y, width, masked in tiles.chunks:
            rows, keys_XW = tiles.row_XM[x:y], _key_rows(tiles, x, y, width, k_SGD)
            visible_XM = tiles.visible_XM[x:y]
            q_XMD, dout_XMD = _gather(q_QD, rows), _gather(dout_QD, rows)
            k_XWD, v_XWD = _gather(k_CD, keys_XW), _gather(v_CD, keys_XW)
            scores_XMW = _scores(q_XMD, k_XWD, visible_XM if masked else None, scale)
            # lse +inf turns the probabilities of padding into exact zeros.
            lse_XM = lse_Q[rows].masked_fill_(visible_XM == 0, torch.inf)
            prob_XMW = scores_XMW.sub_(lse_XM[..., None]).exp2_()
            dv_CD.index_add_(0, keys_XW.flatten(), _product(prob_XMW.to(q_XMD.dtype).mT, dout_XMD).flatten(0, 1))
            dscores_XMW = _product(dout_XMD, v_XWD.mT).sub_(delta_Q[rows][..., None]).mul_(prob_XMW).mul_(scale)
            dscores_XMW = dscores_XMW.to(q_XMD.dtype)
            dk_CD.index_add_(0, keys_XW.flatten(), _product(dscores_XMW.mT, q_XMD).flatten(0, 1))
            dq_QD.index_add_(0, rows.flatten(), _product(dscores_XMW, k_XWD).flatten(0, 1))
    dtype = q_THD.dtype
    return (
        dq_QD.view(q_THD.shape).to(dtype),
        dk_CD.view(k_SGD.shape).to(dtype),
        dv_CD.view(v_SGD.shape).to(dtype),
    )


def _slices(seq: SequenceInfo, picks_THK: Tensor, head_dim: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries whose partials fit the budget."""
    num_queries, num_heads, top_k = picks_THK.shape
    if seq.num_held == 0:
        return
    step = max(1, _budget(_SLICE_ELEMENTS, picks_THK) // (num_heads * top_k * head_dim))
    for begin in range(0, num_queries, step):
        yield begin, min(begin + step, num_queries)


def _label(
    picks_THK: Tensor, first_query: int, seq: SequenceInfo, block_size: int, num_key_heads: int
) -> tuple[Tensor, Tensor]:
    """How many keys of its block each pair sees, and which (key head, block) list it joins."""
    num_queries, num_heads, _ = picks_THK.shape
    table = seq.blocks(block_size)
    blocks = table.on(picks_THK.device)
    picks = picks_THK.long().clamp_(min=0)
    held_N = blocks.held_end_N - blocks.held_start_N
    limit_T = blocks.limit_T[first_query : first_query + num_queries]
    visible_THK = torch.minimum(limit_T[:, None, None] - blocks.held_start_N[picks], held_N[picks]).clamp_(min=0)
    visible_THK.masked_fill_(picks_THK < 0, 0)
    key_head_H = torch.arange(num_heads, device=picks.device) // (num_heads // num_key_heads)
    list_THK = picks + key_head_H[:, None] * table.num_blocks
    return visible_THK.flatten(), list_THK.flatten()


def _cut(picks_THK: Tensor, first_query: int, seq: SequenceInfo, block_size: int, num_key_heads: int) -> _Tiles:
    """Sort the pairs of queries first_query .. first_query + T by (key head, block) and cut them into tiles."""
    _, num_heads, top_k = picks_THK.shape
    device, on_host = picks_THK.device, _on_host(picks_THK)
    table = seq.blocks(block_size)
    num_lists, num_pairs = num_key_heads * table.num_blocks, picks_THK.numel()
    # Long tiles gather keys less often, short ones waste less at the end of a list: about six to a list.
    size = 1 << (max(1, num_pairs // (6 * num_lists)).bit_length() - 1)
    size = min(max(size, _TILES[0]), _TILES[1])

    visible_P, list_P = _label(picks_THK, first_query, seq, block_size, num_key_heads)
    if on_host:
        # Pairs that see a whole block come first: their tiles need no mask.
        list_P += (visible_P < block_size) * num_lists
        num_lists *= 2
    list_P.masked_fill_(visible_P == 0, num_lists)
    sorted_P, order_P = list_P.sort(stable=True)
    bounds = torch.searchsorted(sorted_P, torch.arange(num_lists + 1, device=device))
    tiles_before = torch.cat([bounds.new_zeros(1), ((bounds.diff() + size - 1) // size).cumsum(0)])
    num_tiles = int(tiles_before[-1]) if on_host else min(num_pairs, num_pairs // size + num_lists)

    # Tile -> its list -> its slice of the sorted pairs.
    tile_X = torch.arange(num_tiles, device=device)
    list_X = torch.searchsorted(tiles_before[1:], tile_X, right=True).clamp_(max=num_lists - 1)
    place_X = bounds[list_X] + (tile_X - tiles_before[list_X]) * size
    place_XM = place_X[:, None] + torch.arange(size, device=device)
    padding_XM = place_XM >= bounds[list_X + 1][:, None]
    pair_XM = order_P[place_XM.clamp_(max=num_pairs - 1)]
    visible_XM = visible_P[pair_XM].masked_fill_(padding_XM, 0)
    row_XM = (pair_XM // top_k + first_query * num_heads).masked_fill_(padding_XM, 0)

    # Pair -> its slot, the way back.
    nowhere = num_tiles * size
    first_slot = torch.cat([tiles_before[:-1] * size - bounds[:-1], bounds.new_full((1,), nowhere)])
    slot_P = torch.empty_like(order_P)
    slot_P[order_P] = (first_slot[sorted_P] + torch.arange(num_pairs, device=device)).clamp_(max=nowhere)

    columns = _budget(_CHUNK_ELEMENTS, picks_THK) // size
    if on_host:
        whole = int(tiles_before[num_lists // 2])
        chunks = list(_chunks(0, whole, block_size, False, columns))
        for x, y, _, masked in _chunks(whole, num_tiles, table.max_block, True, columns):
            chunks.append((x, y, int(visible_XM[x:y].max()), masked))
    else:
        chunks = list(_chunks(0, num_tiles, table.max_block, True, columns))
    list_X %= num_key_heads * table.num_blocks
    start_X = table.on(device).held_start_N[list_X % table.num_blocks]
    return _Tiles(slot_P, row_XM, visible_XM, start_X, list_X // table.num_blocks, chunks)


def _chunks(first: int, last: int, width: int, masked: bool, columns: int) -> Iterator[tuple[int, int, int, bool]]:
    """Tiles first .. last in runs of at most `columns` key columns."""
    step = max(1, columns // width)
    for x in range(first, last, step):
        yield x, min(x + step, last), width, masked


def _key_rows(tiles: _Tiles, x: int, y: int, width: int, k_SGD: Tensor) -> Tensor:
    """Rows of k seen as [S * G, D] under every column of the tiles; columns past the end are masked by the caller."""
    held_XW = tiles.start_X[x:y, None] + torch.arange(width, device=k_SGD.device)
    return held_XW.clamp_(max=k_SGD.shape[0] - 1).mul_(k_SGD.shape[1]).add_(tiles.head_X[x:y, None])


def _scores(q_XMD: Tensor, k_XWD: Tensor, visible_XM: Tensor | None, scale: float) -> Tensor:
    """Logits in units of log 2 (exp2 is faster than exp), -inf from column `visible_XM` on."""
    scores_XMW = _product(q_XMD, k_XWD.mT).mul_(scale / _LN_2)
    if visible_XM is None:
        return scores_XMW
    column_W = torch.arange(scores_XMW.shape[-1], device=scores_XMW.device)
    return torch.where(column_W < visible_XM[..., None], scores_XMW, -torch.inf)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    # index_select on long rows is several times faster than indexing on a CPU.
    taken = rows.index_select(0, index.flatten()).view(*index.shape, rows.shape[1])
    return taken if rows.device.type == "cuda" else taken.to(accumulator(rows.dtype))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched product summed and returned in the accumulator's dtype."""
    if a.device.type == "cuda" and a.element_size() == 2:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b)


def _on_host(tensor: Tensor) -> bool:
    """Whether sizes that depend on the picks may be read without waiting for a device."""
    return tensor.device.type == "cpu"


def _budget(elements: dict[str, int], tensor: Tensor) -> int:
    return elements["cpu" if tensor.device.type == "cpu" else "cuda"]
