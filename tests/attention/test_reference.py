"""The reference against numbers worked out by hand, and against torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moba_train.attention import SequenceInfo, full_attention, moba_attention, select_blocks
from tests.helpers.cases import CASES, Case
from tests.helpers.tolerance import assert_close

# exp(key) is 1, 2, 1, 3; values 1, 2, 3, 4; queries 1 for head 0 and -1 for head 1; scale 1.
K_SGD = torch.tensor([1.0, 2.0, 1.0, 3.0], dtype=torch.float64).log()[:, None, None]
V_SGD = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)[:, None, None]
Q_THD = torch.tensor([1.0, -1.0], dtype=torch.float64).expand(4, 2)[..., None]


def check(result: tuple[Tensor, Tensor], outs: list[list[float]], sums: list[list[float]]) -> None:
    """`outs` and `sums` are per head: the weighted mean of the values and the sum of the weights, exp(lse)."""
    expected_out = torch.tensor(outs, dtype=torch.float64).T[..., None]
    assert_close(result[0], expected_out, torch.float64)
    assert_close(result[1], torch.tensor(sums, dtype=torch.float64).T.log(), torch.float64)


def test_full_attention_by_hand() -> None:
    result = full_attention(Q_THD, K_SGD, V_SGD, SequenceInfo([0, 4]), softmax_scale=1.0, backend="reference")
    # Weights of head 0: 1, 2, 1, 3. Of head 1: 1, 1/2, 1, 1/3.
    outs = [[1, 5 / 3, 8 / 4, 20 / 7], [1, 2 / 1.5, 5 / 2.5, (5 + 4 / 3) / (2.5 + 1 / 3)]]
    check(result, outs, [[1, 3, 4, 7], [1, 1.5, 2.5, 2.5 + 1 / 3]])


def test_two_documents_by_hand() -> None:
    result = full_attention(Q_THD, K_SGD, V_SGD, SequenceInfo([0, 2, 2, 4]), softmax_scale=1.0, backend="reference")
    outs = [[1, 5 / 3, 3, 15 / 4], [1, 2 / 1.5, 3, (3 + 4 / 3) / (4 / 3)]]
    check(result, outs, [[1, 3, 1, 4], [1, 1.5, 1, 4 / 3]])


def moba(block_size: int, top_k: int, **sequence: object) -> tuple[Tensor, Tensor]:
    seq = SequenceInfo([0, 4], **sequence)
    q = Q_THD if seq.q_positions is None else Q_THD[seq.q_positions]
    return moba_attention(
        q, K_SGD, V_SGD, seq, block_size=block_size, top_k=top_k, softmax_scale=1.0, backend="reference"
    )


def test_one_pick_by_hand() -> None:
    outs = [[1, 5 / 3, 3, 15 / 4], [1, 2 / 1.5, 3, (3 + 4 / 3) / (4 / 3)]]
    check(moba(block_size=2, top_k=1), outs, [[1, 3, 1, 4], [1, 1.5, 1, 4 / 3]])


def test_two_picks_by_hand() -> None:
    # Token 3, head 0 adds token 1 (largest key); head 1 adds token 0, tied with token 2 and lower.
    outs = [[1, 5 / 3, 7 / 3, 16 / 5], [1, 2 / 1.5, 2, (1 + 4 / 3) / (4 / 3)]]
    check(moba(block_size=1, top_k=2), outs, [[1, 3, 3, 5], [1, 1.5, 2, 4 / 3]])


def test_decode_by_hand() -> None:
    check(moba(block_size=1, top_k=2, q_positions=[3]), [[16 / 5], [7 / 4]], [[5], [4 / 3]])


def test_partial_keys_by_hand() -> None:
    """Keys 1 and 2 held: token 0 sees nothing; token 3 of head 0 picked block 1."""
    seq = SequenceInfo([0, 4], k_positions=[1, 2])
    picks = select_blocks(Q_THD, K_SGD, SequenceInfo([0, 4]), block_size=1, top_k=2)
    out, lse = moba_attention(
        Q_THD, K_SGD[1:3], V_SGD[1:3], seq, block_size=1, top_k=2, softmax_scale=1.0, picks=picks, backend="reference"
    )
    assert out[0].tolist() == [[0.0], [0.0]]
    assert lse[0].tolist() == [-math.inf, -math.inf]
    assert_close(out[3, 0], V_SGD[1, 0], torch.float64)
    assert lse[3].tolist() == [math.log(2), -math.inf]


@pytest.mark.parametrize("case", [case for case in CASES if case.q_positions is None], ids=str)
def test_full_equals_torch(case: Case) -> None:
    q, k, v, *_ = case.inputs()
    out, _ = full_attention(q, k, v, case.sequence(), backend="reference")
    for start, end in zip(case.cu_seqlens, case.cu_seqlens[1:], strict=False):
        if start < end:
            q_HLD, k_GLD, v_GLD = (tensor[start:end].transpose(0, 1) for tensor in (q, k, v))
            expected = scaled_dot_product_attention(q_HLD, k_GLD, v_GLD, is_causal=True, enable_gqa=True)
            assert_close(out[start:end], expected.transpose(0, 1), torch.float64)


@pytest.mark.parametrize("case", [case for case in CASES if case.q_positions is None], ids=str)
def test_moba_that_covers_equals_torch(case: Case) -> None:
    q, k, v, *_ = case.inputs()
    seq = case.sequence()
    sizes = {"block_size": case.block_size, "top_k": max(1, seq.max_document)}
    out, _ = moba_attention(q, k, v, seq, **sizes, backend="reference")
    expected, _ = full_attention(q, k, v, seq, backend="reference")
    assert_close(out, expected, torch.float64)
