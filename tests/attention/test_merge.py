"""Merging by log-sum-exp: hand numbers, empty parts, huge logits, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moba_train.attention import merge
from tests.helpers.tolerance import assert_close, assert_gradients


def part(out: list[float], lse: list[float], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """One query, one head per entry, head dim 1."""
    return torch.tensor(out, dtype=dtype)[None, :, None], torch.tensor(lse, dtype=dtype)[None]


def test_by_hand() -> None:
    """Sums of weights 4 and 5: the example of the README."""
    out, lse = merge([part([3.5], [math.log(4)]), part([5.8], [math.log(5)])])
    assert_close(out, part([43 / 9], [0])[0], torch.float64)
    assert_close(lse, part([0], [math.log(9)])[1], torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_and_empty(dtype: torch.dtype) -> None:
    inf = math.inf
    left = part([1.0, 2.0, 0.0, 0.0, 7.0], [1000.0, -1000.0, -inf, -inf, 1000.0], dtype)
    right = part([3.0, 4.0, 5.0, 0.0, 9.0], [1000.0, -1000.0, -1000.0, -inf, -1000.0], dtype)
    inputs = [tensor.requires_grad_() for pair in (left, right) for tensor in pair]
    out, lse = merge([left, right])
    assert_close(out, part([2.0, 3.0, 5.0, 0.0, 7.0], [0] * 5, dtype)[0], dtype)
    log_2 = math.log(2)
    assert_close(lse, part([0] * 5, [1000 + log_2, log_2 - 1000, -1000.0, -inf, 1000.0], dtype)[1], dtype)
    grads = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse)))
    assert all(grad.isfinite().all() for grad in grads)
    assert all(grad[0, 3].abs().sum() == 0 for grad in grads)


def test_order_and_grouping_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(5, 3, 4, dtype=torch.float64, generator=generator), 10 * torch.randn(5, 3, generator=generator))
        for _ in range(4)
    ]
    parts = [(out, lse.double()) for out, lse in parts]
    out, lse = merge(parts)
    running = parts[3]
    for other in parts[:3]:
        running = merge([other, running])
    assert_close(running[0], out, torch.float64)
    assert_close(running[1], lse, torch.float64)


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 2, *end, dtype=torch.float64, generator=generator) for end in ((2,), ()) * 3]

    def merged(*flat: Tensor) -> tuple[Tensor, Tensor]:
        return merge(list(zip(flat[::2], flat[1::2], strict=True)))

    assert_gradients(merged, [tensor.requires_grad_() for tensor in tensors])


def test_dtype_is_the_widest_of_the_outs() -> None:
    lse = torch.zeros(2, 1)
    low, high = torch.ones(2, 1, 4, dtype=torch.bfloat16), torch.ones(2, 1, 4)
    assert merge([(low, lse), (low, lse)])[0].dtype == torch.bfloat16
    assert merge([(low, lse), (high, lse)])[0].dtype == torch.float32


def test_nothing_to_merge() -> None:
    with pytest.raises(ValueError, match="at least one"):
        merge([])
