"""Gate metrics against plain loops over the picks, and covered mass against a dense softmax."""

from itertools import pairwise

import pytest
import torch

from moba_train.attention import SequenceInfo, select_blocks
from moba_train.model.layer_plan import LayerAttention, LayerKind
from moba_train.train.gate_metrics import block_loads, gate_sums
from moba_train.train.gate_picture import draw_gate
from moba_train.train.observe import covered_mass, queries_with_choice
from tests.helpers.tolerance import assert_close

DOCUMENTS = (0, 0, 50, 53, 53, 120)
LAYERS = [LayerAttention(LayerKind.MOBA, *sizes) for sizes in ((8, 3), (8, 2), (8, 1), (7, 4), (64, 3))]


def inputs(layer, heads=4, key_heads=2):
    seq = SequenceInfo(DOCUMENTS)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(seq.num_keys, heads, 16, generator=generator)
    k = torch.randn(seq.num_keys, key_heads, 16, generator=generator)
    return seq, q, k, select_blocks(q, k, seq, block_size=layer.block_size, top_k=layer.top_k)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_sums_are_those_of_a_plain_loop(layer):
    seq, q, _, picks = inputs(layer)
    size, heads = layer.block_size, q.shape[1]
    blocks = [(d, s, min(s + size, d[1])) for d in pairwise(DOCUMENTS) for s in range(*d, size)]
    own = [next(n for n, (_, a, b) in enumerate(blocks) if a <= t < b) for t in range(seq.num_keys)]
    loads = [[0] * len(blocks) for _ in range(heads)]
    could = [0] * len(blocks)
    sums = [[0.0] * 4 for _ in range(heads)]
    for t in range(seq.num_keys):
        earlier = [n for n in range(own[t]) if blocks[n][0] == blocks[own[t]][0]]
        if len(earlier) <= layer.top_k - 1:
            continue
        for n in earlier:
            could[n] += heads * (layer.top_k > 1)
        for h in range(heads):
            for n in set(picks[t, h].tolist()) - {own[t], -1}:
                loads[h][n] += 1
                (start, _), first, last = blocks[n][0], blocks[n][1], blocks[n][2] - 1
                for i, x in enumerate((1, first == start, own[t] - n, t - (first + last) / 2)):
                    sums[h][i] += x
    table = seq.blocks(size)
    found = block_loads(picks, queries_with_choice(seq, layer), table.own_T, table.num_blocks)
    assert found.tolist() == loads
    sums_HC, picks_2N = gate_sums(found, seq, layer)
    assert sums_HC[:, :4].tolist() == sums
    assert picks_2N.tolist() == [[sum(x) for x in zip(*loads, strict=True)], could]
    candidates = sum(n > 0 for n in could)
    expected = [max(x) / (sum(x) / candidates) if candidates else 0.0 for x in loads]
    assert_close(sums_HC[:, 4], torch.tensor(expected, dtype=torch.float64), torch.float64)
    assert sums_HC[:, 5].tolist() == [float(candidates > 0)] * heads


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_covered_mass_is_the_share_of_a_dense_softmax(layer):
    seq, q, k, picks = inputs(layer)
    rows = torch.tensor([0, 7, 49, 51, 60, 93, 119])
    found = covered_mass(q[rows], k, picks[rows], rows, seq, layer, 0.3, None)
    expected = torch.zeros(len(rows), 4)
    for i, t in enumerate(rows.tolist()):
        start = max(d for d in DOCUMENTS if d <= t)
        for h in range(4):
            weights = (k[start : t + 1, h // 2] @ q[t, h] * 0.3).softmax(0)
            shown = [(s - start) // layer.block_size for s in range(start, t + 1)]
            offset = int(seq.blocks(layer.block_size).first_T[t])
            chosen = set(picks[t, h].tolist())
            expected[i, h] = sum(w for w, n in zip(weights, shown, strict=True) if n + offset in chosen)
    assert_close(found, expected, torch.float32)
    assert (expected[2] < 0.999).any() == (layer.block_size < 50)


@pytest.mark.parametrize("moba", [[True], [False] * 2, [True, False] * 30], ids=["one layer", "all full", "sixty"])
def test_picture_of_any_depth(tmp_path, moba):
    shares = [0.5 if is_moba else None for is_moba in moba]
    record = {
        "step": 7,
        "gate/pick_rate": [[1.0, 0.1, None] if is_moba else None for is_moba in moba],
        "gate/pick_rate_tokens": [512 if is_moba else None for is_moba in moba],
        "gate/sink_share": shares,
        "gate/mass_covered": shares,
        "gradient_density/pairs": [1.0] * len(moba),
        "gradient_density/direct": [0.2] * len(moba),
    }
    path = draw_gate(record, tmp_path / "gate.png")
    assert path.read_bytes().startswith(b"\x89PNG")
