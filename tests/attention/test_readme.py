"""The worked example of moba_train/attention/README.md."""

from __future__ import annotations

import math
from pathlib import Path

import torch

import moba_train.attention
from moba_train.attention import (
    SequenceInfo,
    block_means,
    convolve_keys,
    full_attention,
    merge,
    moba_attention,
    select_blocks,
)
from tests.helpers.tolerance import assert_close

K = torch.tensor([1.0, 3.0, 2.0, 2.0, 1.0, 4.0], dtype=torch.float64).log()[:, None, None]
V = torch.arange(1.0, 7.0, dtype=torch.float64)[:, None, None]
Q = torch.ones(1, 1, 1, dtype=torch.float64)
BOUNDS, LAST, SIZES = [0, 6], [5], {"block_size": 2, "top_k": 2}


def check(result: tuple[torch.Tensor, torch.Tensor], out: float, weights: float) -> None:
    assert_close(result[0], torch.full_like(Q, out), torch.float64)
    assert_close(result[1], torch.full_like(Q[..., 0], math.log(weights)), torch.float64)


def test_worked_example() -> None:
    text = Path(moba_train.attention.__file__).with_name("README.md").read_text()
    seq = SequenceInfo(BOUNDS, LAST)
    means = block_means(K, seq, 2).flatten().tolist()
    assert f"/ 2 = {means[0]:.3f}" in text
    assert f"/ 2 = {means[1]:.3f}" in text
    picks = select_blocks(Q, K, seq, **SIZES)
    assert picks.flatten().tolist() == [2, 1]
    assert "[2, 1]" in text

    parts = []
    for rows, out, weights in (([2, 3], 3.5, 4), ([4, 5], 5.8, 5)):
        held = SequenceInfo(BOUNDS, LAST, rows)
        parts.append(moba_attention(Q, K[rows], V[rows], held, **SIZES, softmax_scale=1.0, picks=picks))
        check(parts[-1], out, weights)
        assert f"/ {weights} = {out} " in text
        assert f"lse log {weights}\n" in text
    check(merge(parts), 43 / 9, 9)
    for backend in ("reference", "portable"):
        check(moba_attention(Q, K, V, seq, **SIZES, softmax_scale=1.0, backend=backend), 43 / 9, 9)
    check(full_attention(Q, K, V, seq, softmax_scale=1.0), 50 / 13, 13)
    assert f"43/9 = {43 / 9:.3f}" in text
    assert f"50/13 = {50 / 13:.3f}" in text
    assert f"would be {3.5 + 5.8:.1f}," in text


def test_options_of_the_gate() -> None:
    text = Path(moba_train.attention.__file__).with_name("README.md").read_text()
    seq = SequenceInfo(BOUNDS, LAST)
    assert select_blocks(-Q, K, seq, **SIZES).flatten().tolist() == [2, 0]
    assert select_blocks(-Q, K, seq, **SIZES, force_previous_block=True).flatten().tolist() == [2, 1]
    assert "picks `[2, 0]`; forced, `[2, 1]`" in text
    assert select_blocks(Q, K, seq, **SIZES).flatten().tolist() == [2, 1]
    assert select_blocks(Q, K, seq, **SIZES, force_first_block=True).flatten().tolist() == [2, 0]
    assert "picks\n`[2, 1]`; forced, `[2, 0]`" in text
    heads = torch.tensor([1.0, -3.0], dtype=torch.float64)[None, :, None]
    assert select_blocks(heads, K, seq, **SIZES)[0].tolist() == [[2, 1], [2, 0]]
    assert select_blocks(heads, K, seq, **SIZES, share_picks_in_group=True)[0].tolist() == [[2, 0], [2, 0]]
    assert "pick `[2, 1]` and `[2, 0]`; sharing (mean query -1), both `[2, 0]`" in text

    weight = torch.tensor([[[0.5, 1.0]]], dtype=torch.float64)
    key = float(convolve_keys(K, weight, SequenceInfo(BOUNDS))[3])
    mixed = 1.5 * math.log(2)
    assert f"= {mixed:.3f}`" in text
    assert f"`{math.log(2):.3f} + {mixed / (1 + math.exp(-mixed)):.3f} = {key:.3f}`" in text
