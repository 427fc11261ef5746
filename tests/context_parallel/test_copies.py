"""Copies by words of 8 bytes give what PyTorch's copies give, bit by bit, and are words where it matters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moba_train.context_parallel import copies

ROWS, HEADS, HEAD_DIM = 6, 8, 16
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32]
VIEWS = {
    "head slice": lambda x: x[:, 2:4],
    "heads first": lambda x: x.transpose(0, 1),
    "heads by rank": lambda x: x.unflatten(1, (2, -1))[:, :, 1:3].transpose(0, 1),
    "odd width": lambda x: x[..., :7],
    "odd start": lambda x: x[..., 1:9],
    "odd head stride": lambda x: x.reshape(-1)[: 5 * 9].view(5, 9)[:, :4],
    "every other channel": lambda x: x[..., ::2],
    "expanded rows": lambda x: x[:1].expand(ROWS, -1, -1),
    "expanded channels": lambda x: x[..., :1].expand(-1, -1, HEAD_DIM),
    "one dim": lambda x: x[:, 0, 0],
    "no rows": lambda x: x[:0, 2:4],
    "contiguous": lambda x: x,
}


def whole(dtype: torch.dtype) -> Tensor:
    bits = torch.randint(-(2**62), 2**62, (ROWS, HEADS, HEAD_DIM), generator=torch.Generator().manual_seed(0))
    return bits.view(dtype)[..., :HEAD_DIM].contiguous()  # any pattern of bits, NaNs among them


def bits(x: Tensor) -> list:
    return x.contiguous().view(torch.uint8).tolist() if x.numel() else [*x.shape]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_bits_and_shapes_are_those_of_plain_copies(name: str, dtype: torch.dtype) -> None:
    x = VIEWS[name](whole(dtype))
    got = copies.contiguous(x)
    assert got.is_contiguous()
    assert (got.shape, got.dtype) == (x.shape, x.dtype)
    assert bits(got) == bits(x)
    total = torch.zeros(ROWS, HEADS, HEAD_DIM, dtype=dtype)
    if x.shape == total[:, 2:4].shape:
        copies.copy_into(total[:, 2:4], x)
        assert bits(total[:, 2:4]) == bits(x)
        assert not total[:, :2].any()
        assert not total[:, 4:].any()


def test_a_copy_between_dtypes_converts() -> None:
    total, x = torch.zeros(3, 8), torch.arange(24, dtype=torch.bfloat16).view(3, 8)
    copies.copy_into(total, x)
    assert torch.equal(total, x.float())


def test_one_side_without_whole_words_is_copied_by_elements() -> None:
    total, x = torch.zeros(3, 9, dtype=torch.bfloat16), torch.arange(24, dtype=torch.bfloat16).view(3, 8)
    copies.copy_into(total[:, 1:], x)
    assert torch.equal(total[:, 1:], x)


@pytest.mark.parametrize("name", ["head slice", "heads first", "heads by rank"])
def test_slices_of_heads_move_as_words(name: str) -> None:
    assert copies._words(VIEWS[name](whole(torch.bfloat16))).dtype == torch.int64
