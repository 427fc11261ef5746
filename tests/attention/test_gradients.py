"""fp64 gradients against finite differences, through out and lse."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from moba_train.attention import SequenceInfo, full_attention, moba_attention, select_blocks
from tests.helpers.cases import zigzag_positions
from tests.helpers.tolerance import assert_gradients

LAYOUTS = {
    "packed": SequenceInfo([0, 1, 1, 8]),
    "zigzag": SequenceInfo([0, 3, 12], zigzag_positions(12, 0, 2)),
    "decode": SequenceInfo([0, 3, 9], [2, 8]),
}


def leaves(seq: SequenceInfo, heads: int, key_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((seq.num_queries, heads, 2), (seq.num_keys, key_heads, 2), (seq.num_keys, key_heads, 2))
    return [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("seq", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("heads", [(2, 2), (3, 1)], ids=["mha", "gqa"])
def test_moba(seq: SequenceInfo, heads: tuple[int, int]) -> None:
    inputs = leaves(seq, *heads)
    picks = select_blocks(*inputs[:2], seq, block_size=2, top_k=2)
    assert_gradients(partial(moba_attention, seq=seq, block_size=2, top_k=2, picks=picks, backend="portable"), inputs)


@pytest.mark.parametrize("seq", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("heads", [(2, 2), (3, 1)], ids=["mha", "gqa"])
def test_full(seq: SequenceInfo, heads: tuple[int, int]) -> None:
    assert_gradients(partial(full_attention, seq=seq, backend="sdpa"), leaves(seq, *heads))
