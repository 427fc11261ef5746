"""Partial attention: parts of the keys, merged, are the whole; and what a part does not hold does not show."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from moba_train.attention import SequenceInfo, full_attention, merge, moba_attention, select_blocks
from tests.helpers.cases import CASES, CASES_BY_NAME, Case, Result, run_op
from tests.helpers.tolerance import assert_close


def split(rows: int, how: str) -> list[list[int]]:
    if how == "zigzag":
        cuts = [rows * i // 6 for i in range(7)]
        chunks = [list(range(a, b)) for a, b in pairwise(cuts)]
        return [chunks[rank] + chunks[5 - rank] for rank in range(3)]
    if how == "strided":
        return [list(range(rank, rows, 2)) for rank in range(2)]
    return [list(range(rows)), []]


def merged(op, q: Tensor, k: Tensor, v: Tensor, case: Case, parts: list[list[int]]) -> tuple[Tensor, Tensor]:
    results = []
    for rows in parts:
        seq = SequenceInfo(case.cu_seqlens, case.q_positions, rows)
        results.append(op(q, k[rows], v[rows], seq))
    return merge(results)


def check(op, case: Case, how: str, device: str, dtype: torch.dtype, reference) -> None:
    inputs = case.inputs(dtype, device)
    parts = split(case.cu_seqlens[-1], how)
    actual = run_op(partial(merged, op, case=case, parts=parts), inputs)
    expected = run_op(partial(reference, seq=case.sequence()), inputs)
    for name, got, want in zip(Result._fields, actual, expected, strict=True):
        assert_close(got, want, dtype, name)


@pytest.mark.parametrize("how", ["zigzag", "strided", "all-and-nothing"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_moba_parts_make_the_whole(case: Case, how: str, moba_backend) -> None:
    dtype = moba_backend.dtypes[0]
    if dtype == torch.float32 and not case.fp32_gradients:
        pytest.skip("lse in fp32 is too coarse for this case's gradients")
    q, k, *_ = case.inputs(dtype, moba_backend.device)
    sizes = case.routing
    picks = select_blocks(q, k, case.sequence(), **sizes)
    op = partial(moba_attention, picks=picks, **sizes)
    reference = partial(op, backend="reference")
    check(partial(op, backend=moba_backend.name), case, how, moba_backend.device, dtype, reference)


@pytest.mark.parametrize("how", ["zigzag", "strided", "all-and-nothing"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_full_parts_make_the_whole(case: Case, how: str, full_backend) -> None:
    dtype = full_backend.dtypes[0]
    if dtype == torch.float32 and not case.fp32_gradients:
        pytest.skip("lse in fp32 is too coarse for this case's gradients")
    reference = partial(full_attention, backend="reference")
    op = partial(full_attention, backend=full_backend.name)
    check(op, case, how, full_backend.device, dtype, reference)


@pytest.mark.parametrize("sparse", [True, False], ids=["moba", "full"])
def test_queries_that_see_nothing(sparse: bool, moba_backend, full_backend) -> None:
    """The last rows of both documents held: all earlier queries get out 0, lse -inf and gradient 0."""
    case = CASES_BY_NAME["last-block-of-one"]
    backend = moba_backend if sparse else full_backend
    held, dtype = [30, 31, 32, 57], torch.float32
    inputs = case.inputs(dtype, backend.device)
    seq = SequenceInfo(case.cu_seqlens, k_positions=held)
    sizes = case.routing
    picks = select_blocks(inputs.q_THD, inputs.k_SGD, case.sequence(), **sizes)
    k, v = (tensor.detach()[held].requires_grad_() for tensor in (inputs.k_SGD, inputs.v_SGD))
    inputs = inputs._replace(k_SGD=k, v_SGD=v)
    op = partial(moba_attention, picks=picks, **sizes) if sparse else full_attention
    result = run_op(partial(op, seq=seq, backend=backend.name), inputs)
    blind = [t for t in range(58) if t < 30 or 33 <= t < 57]
    assert (result.out[blind] == 0).all()
    assert (result.lse[blind] == -torch.inf).all()
    assert (result.dq[blind] == 0).all()
    assert all(grad.isfinite().all() for grad in (result.dq, result.dk, result.dv))
    assert result.lse[[30, 57]].isfinite().all()


def test_moba_asks_for_picks() -> None:
    seq = SequenceInfo([0, 8], k_positions=[0, 1])
    q, k = torch.ones(8, 1, 2), torch.ones(2, 1, 2)
    with pytest.raises(ValueError, match="pass picks"):
        moba_attention(q, k, k, seq, block_size=2, top_k=2)
