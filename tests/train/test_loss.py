"""Masked sums: what a masked token holds never matters."""

import torch

from moba_train.train.loss import masked_sum, position_sums


def test_masked_tokens_add_nothing_not_even_nan():
    losses = torch.tensor([1.0, float("nan"), 3.0, float("inf")], requires_grad=True)
    total, count = masked_sum(losses, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    total.backward()
    assert (total.item(), count.item()) == (4.0, 2)
    assert losses.grad is not None
    assert losses.grad.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_a_row_without_loss_tokens_is_zero_over_zero():
    total, count = masked_sum(torch.tensor([2.0, 2.0]), torch.zeros(2))
    assert (total.item(), count.item()) == (0.0, 0)


def test_weights_weigh_loss_gradient_and_count():
    losses = torch.tensor([1.0, 2.0, 5.0], requires_grad=True)
    weights = torch.tensor([0.5, 0.0, 0.125])
    total, count = masked_sum(losses, weights)
    total.backward()
    assert (total.item(), count.item()) == (1.125, 0.625)
    assert losses.grad is not None
    assert losses.grad.tolist() == weights.tolist()
    sums = position_sums(losses.detach(), weights, torch.tensor([0, 1, 2]), buckets=2, length=4)
    assert sums.tolist() == [[0.5, 0.625], [0.5, 0.125]]


def test_position_sums_by_bucket():
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    positions = torch.tensor([0, 1, 2, 3, 9])  # a position past the length falls into the last bucket
    sums = position_sums(losses, torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]), positions, buckets=2, length=4)
    assert sums.tolist() == [[3.0, 20.0], [2.0, 2.0]]
