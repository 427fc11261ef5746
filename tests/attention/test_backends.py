"""Every backend against the reference, given the same picks: outputs, lse and gradients through both."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from moba_train.attention import full_attention, moba_attention, portable, reference, select_blocks
from tests.helpers.cases import CASES, CASES_BY_NAME, Case, Result, run_masked, run_op, to_dtype
from tests.helpers.tolerance import assert_close, assert_low_precision

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def assert_same(actual: Result, expected: Result, dtype: torch.dtype, case: Case) -> None:
    for name, got, want in zip(Result._fields, actual, expected, strict=True):
        if name in ("out", "lse") or dtype == torch.float64 or case.fp32_gradients:
            assert_close(got, want, dtype, name)
        assert not got.isnan().any(), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_moba_equals_reference(case: Case, moba_backend) -> None:
    seq, sizes = case.sequence(), case.routing
    for dtype in moba_backend.dtypes:
        inputs = case.inputs(dtype, moba_backend.device)
        picks = select_blocks(inputs.q_THD, inputs.k_SGD, seq, **sizes, backend="reference")
        run = partial(moba_attention, seq=seq, picks=picks, **sizes)
        expected = run_op(partial(run, backend="reference"), inputs)
        assert_same(run_op(partial(run, backend=moba_backend.name), inputs), expected, dtype, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_portable_without_reading_sizes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, where an upper bound stands for the number of tiles and every tile is masked."""
    monkeypatch.setattr(portable, "_on_host", lambda tensor: False)
    seq, sizes, dtype = case.sequence(), case.routing, torch.float64
    inputs = case.inputs(dtype)
    picks = select_blocks(inputs.q_THD, inputs.k_SGD, seq, **sizes)
    run = partial(moba_attention, seq=seq, picks=picks, **sizes)
    expected = run_op(partial(run, backend="reference"), inputs)
    assert_same(run_op(partial(run, backend="portable"), inputs), expected, dtype, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_full_equals_reference(case: Case, full_backend) -> None:
    seq = case.sequence()
    for dtype in full_backend.dtypes:
        inputs = case.inputs(dtype, full_backend.device)
        expected = run_op(partial(full_attention, seq=seq, backend="reference"), inputs)
        actual = run_op(partial(full_attention, seq=seq, backend=full_backend.name), inputs)
        assert_same(actual, expected, dtype, case)


@pytest.mark.parametrize("name", ["picks-cover-exactly", "picks-exceed-blocks", "block-larger-than-documents"])
def test_covering_picks_are_full_attention(name: str, moba_backend) -> None:
    """Sparsity 0, the debugging anchor; given picks no backend may take the dense path instead."""
    case = CASES_BY_NAME[name]
    seq, sizes = case.sequence(), case.routing
    for dtype in moba_backend.dtypes:
        inputs = case.inputs(dtype, moba_backend.device)
        picks = select_blocks(inputs.q_THD, inputs.k_SGD, seq, **sizes)
        sparse = partial(moba_attention, seq=seq, picks=picks, **sizes, backend=moba_backend.name)
        dense = partial(full_attention, seq=seq, backend="reference")
        assert_same(run_op(sparse, inputs), run_op(dense, inputs), dtype, case)


def test_one_pick_is_block_local_attention(moba_backend) -> None:
    """top_k = 1 is causal attention in which every block is a document, never full attention."""
    case = CASES_BY_NAME["top-1"]
    blocks = case.sequence().blocks(case.block_size)
    local = Case("local", (0, *blocks.end_N.tolist()))
    for dtype in moba_backend.dtypes:
        inputs = case.inputs(dtype, moba_backend.device)
        sparse = partial(
            moba_attention, seq=case.sequence(), block_size=case.block_size, top_k=1, backend=moba_backend.name
        )
        dense = partial(full_attention, seq=local.sequence(), backend="reference")
        assert_same(run_op(sparse, inputs), run_op(dense, inputs), dtype, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["last-block-short", "gqa-odd-group", "long-lists", "zigzag-one-document"])
@pytest.mark.parametrize("sparse", [True, False], ids=["moba", "full"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_low_precision(name: str, dtype: torch.dtype, sparse: bool, device: str) -> None:
    """At most twice (gradients: thrice) the error of torch in the same dtype."""
    case = CASES_BY_NAME[name]
    seq, sizes, scale = case.sequence(), case.routing, case.head_dim**-0.5
    inputs = case.inputs(dtype, device)
    if sparse:
        picks = select_blocks(inputs.q_THD, inputs.k_SGD, seq, **sizes)
        mask = reference.moba_mask(seq, picks, case.block_size)
        actual = run_op(partial(moba_attention, seq=seq, picks=picks, **sizes, backend="portable"), inputs)
    else:
        mask = reference.full_mask(seq).to(device)[:, None].expand(-1, case.heads, -1)
        actual = run_op(partial(full_attention, seq=seq, backend="sdpa"), inputs)
    assert actual.out.dtype == dtype
    assert actual.lse.dtype == torch.float32
    same_dtype, exact = run_masked(inputs, mask, scale), run_masked(to_dtype(inputs, torch.float64), mask, scale)
    for field, got, baseline, truth in zip(Result._fields, actual, same_dtype, exact, strict=True):
        kind = "gradient" if field.startswith("d") else "output"
        assert_low_precision(got, baseline, truth, kind, field)


@pytest.mark.parametrize("name", ["blocks-without-queries", "decode", "top-1"])
def test_unseen_keys_get_zero_gradient(name: str, moba_backend) -> None:
    case = CASES_BY_NAME[name]
    seq = case.sequence()
    inputs = case.inputs(torch.float32, moba_backend.device)
    sizes = case.routing
    picks = select_blocks(inputs.q_THD, inputs.k_SGD, seq, **sizes)
    result = run_op(partial(moba_attention, seq=seq, picks=picks, **sizes, backend=moba_backend.name), inputs)
    group = case.heads // case.key_heads
    seen_SG = reference.moba_mask(seq, picks, case.block_size).any(0).T.unflatten(1, (-1, group)).any(2)
    for grad in (result.dk, result.dv):
        assert (grad[~seen_SG] == 0).all()
        assert (grad[seen_SG] != 0).any()


@pytest.mark.parametrize("case", [CASES_BY_NAME["odd-everything"], CASES_BY_NAME["zigzag-first-rank"]], ids=str)
def test_gradient_of_one_output_only(case: Case, moba_backend, full_backend) -> None:
    """A missing gradient counts as zero, for out and for lse."""
    seq, dtype = case.sequence(), torch.float32
    for op, backend in (
        (partial(moba_attention, **case.routing), moba_backend),
        (full_attention, full_backend),
    ):
        inputs = case.inputs(dtype, backend.device)
        leaves = inputs[:3]
        for which, gradient in ((0, inputs.dout_THD), (1, inputs.dlse_TH)):
            actual, expected = (
                torch.autograd.grad(op(*leaves, seq, backend=name)[which], leaves, gradient, allow_unused=True)
                for name in (backend.name, "reference")
            )
            for name, got, want in zip(("dq", "dk", "dv"), actual, expected, strict=True):
                zero = torch.zeros_like(leaves[1])
                assert_close(zero if got is None else got, zero if want is None else want, dtype, name)
