"""The cache of one layer: however a document arrives, its means and picks are those of the whole."""

from __future__ import annotations

import pytest
import torch

from moba_train.attention import LayerCache, SequenceInfo, block_means, means_from_sums, select_blocks

LENGTH, BLOCK, TOP_K, HEAD_DIM = 131, 16, 3, 8
CHUNKS = {
    "one by one": [1] * LENGTH,
    "odd": [1, 7, 37, 16, 1, 69],
    "whole": [LENGTH],
    "then one by one": [50] + [1] * 81,
}


def draw(rows, heads, dtype, seed):
    return torch.randn(rows, heads, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("reserve", [0, 40, 200])
def test_means_are_exactly_those_of_all_keys(chunks, dtype, reserve):
    k_SGD, v_SGD = draw(LENGTH, 2, dtype, 0), draw(LENGTH, 2, dtype, 1)
    cache, row = LayerCache(BLOCK, reserve=reserve), 0
    for size in chunks:
        cache.append(k_SGD[row : row + size], v_SGD[row : row + size])
        row += size
        seq = SequenceInfo([0, row])
        means = means_from_sums(cache._sums_NGD[: seq.blocks(BLOCK).num_blocks], seq, BLOCK, dtype)
        assert torch.equal(means, block_means(k_SGD[:row], seq, BLOCK)), row
    assert torch.equal(cache.keys, k_SGD)
    assert torch.equal(cache.values, v_SGD)


@pytest.mark.parametrize("heads, key_heads", [(4, 2), (3, 3), (4, 1)], ids=["gqa", "mha", "mqa"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_picks_are_exactly_those_of_all_queries(chunks, heads, key_heads):
    q_THD, k_SGD = draw(LENGTH, heads, torch.float32, 2), draw(LENGTH, key_heads, torch.float32, 3)
    expected = select_blocks(q_THD, k_SGD, SequenceInfo([0, LENGTH]), block_size=BLOCK, top_k=TOP_K)
    cache, row = LayerCache(BLOCK), 0
    for size in chunks:
        rows = torch.arange(row, row + size)
        cache.append(k_SGD[rows], k_SGD[rows])
        row += size
        picks = cache.select(q_THD[rows], SequenceInfo([0, row], q_positions=rows), block_size=BLOCK, top_k=TOP_K)
        if row <= TOP_K * BLOCK:
            assert picks is None  # every block is picked: full attention
        else:
            assert torch.equal(picks, expected[rows])


def test_a_full_layer_keeps_no_sums():
    cache = LayerCache(None)
    k_SGD = draw(5, 2, torch.float32, 0)
    cache.append(k_SGD, k_SGD)
    assert (cache.length, cache._sums_NGD) == (5, None)
    with pytest.raises(AssertionError, match="blocks of None"):
        cache.select(k_SGD, SequenceInfo([0, 5]), block_size=BLOCK, top_k=2)
