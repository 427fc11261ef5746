"""Gradient density: the traced sets are exactly the values that autograd gives a non-zero gradient, layer by layer."""

import pytest
import torch

from moba_train.attention import SequenceInfo, convolve_keys, full_attention, moba_attention, select_blocks
from moba_train.model.layer_plan import LayerAttention, LayerKind
from moba_train.train.gradient_density import picked_blocks, trace

HEADS, KEY_HEADS, HEAD_DIM, WIDTH = 4, 2, 8, 16
DOCUMENTS = (0, 0, 5, 38, 64, 64, 91)
ROWS = DOCUMENTS[-1]


def moba(block_size, top_k):
    return LayerAttention(LayerKind.MOBA, block_size, top_k)


FULL = LayerAttention(LayerKind.FULL, 4, 2)
PLANS = {
    "sparse": (moba(4, 2), moba(4, 2), moba(4, 2)),
    "own block alone": (moba(4, 2), moba(8, 1), moba(8, 1)),
    "block sizes differ": (moba(4, 3), moba(8, 2), moba(3, 2)),
    "full in the middle": (moba(4, 2), FULL, moba(4, 2)),
    "full last": (moba(4, 2), moba(4, 2), FULL),
    "full": (FULL, FULL),
    "picks cover everything": (moba(8, 9), moba(8, 9)),
}
MASKS = {
    "one token": [37],
    "first token of a document": [5],
    "one in two documents": [30, 90],
    "last of a block and first of the next": [44, 45, 81],
    "none": [],
    "all": range(ROWS),
}


def forward(plan, loss_S, cut, key_conv=0):
    """A small residual network in fp64: its loss, the values and the picks of every layer. `cut`: no gradient may pass
    from one position to another through keys and values, so that only the loss tokens' own queries carry any."""
    generator = torch.Generator().manual_seed(3)

    def weight(rows, columns):
        return torch.randn(rows, columns, dtype=torch.float64, generator=generator) / rows**0.5

    seq = SequenceInfo(DOCUMENTS)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator)
    values, picks = [], []
    for layer in plan:
        q = (hidden @ weight(WIDTH, HEADS * HEAD_DIM)).view(ROWS, HEADS, HEAD_DIM)
        k, v = ((hidden @ weight(WIDTH, KEY_HEADS * HEAD_DIM)).view(ROWS, KEY_HEADS, HEAD_DIM) for _ in "kv")
        if key_conv:
            k = convolve_keys(k, weight(KEY_HEADS, HEAD_DIM * key_conv).view(KEY_HEADS, HEAD_DIM, key_conv), seq)
        if cut:
            k, v = k.detach(), v.detach()
        v.requires_grad_() if v.is_leaf else v.retain_grad()
        values.append(v)
        if layer.kind is LayerKind.FULL:
            out, _ = full_attention(q, k, v, seq, backend="reference")
            picks.append(None)
        else:
            sizes = {"block_size": layer.block_size, "top_k": layer.top_k}
            picks.append(select_blocks(q, k, seq, backend="reference", **sizes))
            out, _ = moba_attention(q, k, v, seq, picks=picks[-1], backend="reference", **sizes)
        hidden = hidden + out.flatten(1) @ weight(HEADS * HEAD_DIM, WIDTH)
        hidden = hidden + torch.tanh(hidden @ weight(WIDTH, WIDTH))
    return (hidden @ weight(WIDTH, 1)).squeeze(1)[loss_S].sum(), values, picks


def traced(plan, loss_S, picks, key_conv=0):
    seq = SequenceInfo(DOCUMENTS)

    def picked(layer, sources_AS):
        table = seq.blocks(plan[layer].block_size)
        return picked_blocks(picks[layer], table.own_T, sources_AS, KEY_HEADS, table.num_blocks)

    return {layer: reached.expand(-1, KEY_HEADS, -1) for layer, reached in trace(plan, seq, loss_S, picked, key_conv)}


# Not "own block alone": the only key a query sees gets no gradient itself, so the convolution passes none on.
CASES = [(plan, 0) for plan in PLANS] + [("sparse", 3), ("full last", 2)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("plan, key_conv", CASES)
def test_traced_values_are_those_that_autograd_reaches(plan, key_conv, mask):
    loss_S = torch.zeros(ROWS, dtype=torch.bool)
    loss_S[list(MASKS[mask])] = True
    for measure, cut in enumerate((False, True)):
        loss, values, picks = forward(PLANS[plan], loss_S, cut, key_conv)
        if loss_S.any():
            loss.backward()
        reached = traced(PLANS[plan], loss_S, picks, key_conv)
        assert sorted(reached) == list(range(len(values)))
        for layer, v in enumerate(values):
            grad = torch.zeros_like(v) if v.grad is None else v.grad
            assert torch.equal(reached[layer][measure].T, (grad != 0).any(-1)), (layer, "direct" if cut else "through")


def test_direct_never_exceeds_through_all_layers_and_one_full_layer_saturates_the_latter():
    loss_S = torch.zeros(ROWS, dtype=torch.bool)
    loss_S[[63, 90]] = True
    _, _, picks = forward(PLANS["full last"], loss_S, cut=False)
    reached = traced(PLANS["full last"], loss_S, picks)
    for sets in reached.values():
        assert not (sets[1] & ~sets[0]).any()
    before_loss = torch.arange(ROWS) >= 38  # the documents of rows 63 and 90, up to their last tokens
    for layer in (0, 1, 2):
        assert torch.equal(reached[layer][0][0], before_loss)
    assert reached[0][1].sum() < reached[2][1].sum()
