"""The Triton kernels on a CPU, through Triton's interpreter, against the reference.

fp32 and fp16 only: the interpreter's dot is wrong for bf16.

This file runs itself again in a process of its own (helpers/interpreter.py).
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from moba_train.attention import (
    SequenceInfo,
    convolve_keys,
    full_attention,
    merge,
    moba_attention,
    reference,
    select_blocks,
)
from moba_train.attention.gate import block_means, block_sums
from tests.helpers.cases import CASES_BY_NAME, Case, Inputs, Result, run_op
from tests.helpers.interpreter import interpreted, not_interpreted, run_interpreted
from tests.helpers.tolerance import assert_close, assert_low_precision

FP32 = (
    "no-queries",
    "empty-documents",
    "top-1",
    "gqa-odd-group",
    "strided-inputs",
    "zigzag-last-rank",
    "decode-batch",
    "blocks-without-queries",
    "logits-of-1000",
    "first-and-previous-forced",
    "picks-shared-previous-forced",
)
GATE = (
    "ties",
    "gqa-odd-group",
    "empty-documents",
    "previous-forced-ties",
    "previous-forced-zigzag",
    "first-forced-ties",
    "first-forced-zigzag",
    "picks-shared-ties",
    "first-previous-shared-decode",
)
FLASH = (
    "no-queries",
    "only-empty-documents",
    "empty-documents",
    "top-1",
    "gqa-odd-group",
    "strided-inputs",
    "query-subset",
    "zigzag-one-document",
    "decode-batch",
    "blocks-without-queries",
)
MIXED = ("gqa-odd-group", "blocks-without-queries")
FP16 = (("empty-documents", False), ("mqa", False), ("chunked-prefill", False), ("decode-batch", True))


@not_interpreted
def test_in_interpreter() -> None:
    run_interpreted(__file__)


def _attend(case: Case, picks: torch.Tensor, **options):
    from moba_train.attention.kernels import moba as moba_kernels

    seq = case.sequence()

    def op(q, k, v):
        scale = case.head_dim**-0.5
        return moba_kernels.moba_attention(q, k, v, seq, picks, block_size=case.block_size, scale=scale, **options)

    return op


def _picks(case: Case, inputs: Inputs) -> torch.Tensor:
    sizes = case.routing
    return select_blocks(inputs.q_THD, inputs.k_SGD, case.sequence(), **sizes, backend="reference")


@interpreted
@pytest.mark.parametrize("name", FP32)
def test_fp32_equals_reference(name: str) -> None:
    from moba_train.attention.kernels import gate as gate_kernels

    case = CASES_BY_NAME[name]
    seq, inputs = case.sequence(), case.inputs(torch.float32)
    picks = _picks(case, inputs)
    means = block_means(inputs.k_SGD, seq, case.block_size)
    sizes = case.routing
    assert torch.equal(gate_kernels.select_from_means(inputs.q_THD, means, seq, **sizes), picks)
    run = partial(moba_attention, seq=seq, picks=picks, **sizes, backend="reference")
    expected = run_op(run, inputs)
    actual = run_op(_attend(case, picks), inputs)
    for field, got, want in zip(Result._fields, actual, expected, strict=True):
        assert not got.isnan().any(), field
        if field in ("out", "lse") or case.fp32_gradients:
            assert_close(got, want, torch.float32, field)


@interpreted
@pytest.mark.parametrize("name", FLASH)
def test_flash_equals_reference(name: str, flash_stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the flash backend but the library's own kernels; every few pairs a slice of their own."""
    from moba_train.attention import flash_staging

    monkeypatch.setattr(flash_staging, "_STAGING", 0.0)
    monkeypatch.setattr(flash_staging, "_STAGING_FLOOR", 2**15)
    case = CASES_BY_NAME[name]
    seq, inputs = case.sequence(), case.inputs(torch.float32)
    picks = _picks(case, inputs)
    sizes = case.routing
    moba = partial(moba_attention, picks=picks, **sizes)
    for op, backends in ((moba, ("flash", "mixed") if name in MIXED else ("flash",)), (full_attention, ("flash",))):
        expected, *results = (run_op(partial(op, seq=seq, backend=name), inputs) for name in ("reference", *backends))
        for actual in results:
            for field, got, want in zip(Result._fields, actual, expected, strict=True):
                assert_close(got, want, torch.float32, field)


@interpreted
def test_flash_partial_keys_merge_to_the_whole(flash_stand_in: None) -> None:
    case = CASES_BY_NAME["zigzag-last-rank"]
    inputs, whole = case.inputs(torch.float32), case.sequence()
    picks = _picks(case, inputs)
    run = partial(moba_attention, picks=picks, block_size=case.block_size, top_k=case.top_k)

    def in_parts(q, k, v):
        parts = []
        for rows in (range(16), range(16, 52), range(52, 64)):
            seq = SequenceInfo(case.cu_seqlens, case.q_positions, tuple(rows))
            parts.append(run(q, k[list(rows)], v[list(rows)], seq, backend="flash"))
        return merge(parts)

    expected, actual = run_op(partial(run, seq=whole, backend="reference"), inputs), run_op(in_parts, inputs)
    for field, got, want in zip(Result._fields, actual, expected, strict=True):
        assert_close(got, want, torch.float32, field)


@interpreted
def test_flash_gives_nothing_to_queries_between_others_that_see_no_key(flash_stand_in: None) -> None:
    """As a ring's step does where the rank that sent its keys holds none of a document."""
    held = [*range(8), *range(16, 24)]
    seq = SequenceInfo([0, 8, 16, 24], k_positions=held)
    case = Case("", (0, 8, 16, 24), block_size=4, top_k=2)
    inputs = case.inputs(torch.float32)
    q, k, v, *_ = inputs
    moba = partial(moba_attention, picks=_picks(case, inputs), block_size=case.block_size, top_k=case.top_k)
    for op in (full_attention, moba):
        expected, actual = (op(q, k[held], v[held], seq, backend=name) for name in ("reference", "flash"))
        assert not actual[0][8:16].any()
        for got, want in zip(actual, expected, strict=True):
            assert_close(got, want, torch.float32)


@interpreted
@pytest.mark.parametrize(("name", "deterministic"), FP16)
def test_fp16_errs_no_more_than_torch(name: str, deterministic: bool) -> None:
    case = CASES_BY_NAME[name]
    inputs = case.inputs(torch.float16)
    picks = _picks(case, inputs)
    mask = reference.moba_mask(case.sequence(), picks, case.block_size)
    exact, same_dtype = (
        run_op(partial(reference.masked_attention, mask_THS=mask, scale=case.head_dim**-0.5), case.inputs(dtype))
        for dtype in (torch.float64, torch.float16)
    )
    actual = run_op(_attend(case, picks, deterministic=deterministic), inputs)
    assert_low_precision(actual.out, same_dtype.out, exact.out, "output", "out")
    for field in ("dq", "dk", "dv"):
        parts = (getattr(result, field) for result in (actual, same_dtype, exact))
        assert_low_precision(*parts, "gradient", field)


@interpreted
def test_deterministic_gradients_equal_reference() -> None:
    case = CASES_BY_NAME["zigzag-last-rank"]
    inputs = case.inputs(torch.float32)
    picks = _picks(case, inputs)
    run = partial(moba_attention, seq=case.sequence(), picks=picks, **case.routing)
    expected = run_op(partial(run, backend="reference"), inputs)
    actual = run_op(_attend(case, picks, deterministic=True), inputs)
    for field, got, want in zip(Result._fields, actual, expected, strict=True):
        assert_close(got, want, torch.float32, field)


@interpreted
def test_backward_reads_slices_of_the_heads_of_out_and_its_gradient() -> None:
    """As under context parallelism, which gives the op a few heads of its joined output."""
    from moba_train.attention.kernels.backward import row_terms

    generator = torch.Generator().manual_seed(0)
    dout, out = (torch.randn(5, heads, 24, generator=generator)[:, 2:5] for heads in (7, 9))
    dlse, lse = (torch.randn(5, 3, generator=generator) for _ in range(2))
    lse[1, 2] = -torch.inf
    lse2, delta = row_terms(dout, dlse, out, lse)
    assert_close(delta, (dout * out).sum(-1) - dlse, torch.float32)
    assert_close(lse2, (lse / math.log(2)).masked_fill(lse == -torch.inf, torch.inf), torch.float32)


@interpreted
def test_full_attention_equals_reference() -> None:
    case = CASES_BY_NAME["zigzag-last-rank"]
    inputs, run = case.inputs(torch.float32), partial(full_attention, seq=case.sequence())
    actual, expected = (run_op(partial(run, backend=name), inputs) for name in ("triton", "reference"))
    for field, got, want in zip(Result._fields, actual, expected, strict=True):
        assert_close(got, want, torch.float32, field)


@interpreted
@pytest.mark.parametrize("name", GATE)
def test_gate_equals_reference(name: str) -> None:
    from moba_train.attention.kernels import gate as gate_kernels

    case = CASES_BY_NAME[name]
    seq, inputs = case.sequence(), case.inputs(torch.float16)
    means = block_means(inputs.k_SGD, seq, case.block_size)
    sizes = case.routing
    assert torch.equal(gate_kernels.select_from_means(inputs.q_THD, means, seq, **sizes), _picks(case, inputs))


@interpreted
@pytest.mark.parametrize("name", ["strided-inputs", "empty-documents", "zigzag-last-rank", "long-lists"])
def test_key_convolution_equals_reference(name: str) -> None:
    case, seq = CASES_BY_NAME[name], CASES_BY_NAME[name].sequence()
    inputs = case.inputs(torch.float32)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.key_heads, case.head_dim, 3, generator=generator).requires_grad_()
    grad = inputs.dout_THD[:, : case.key_heads]
    results = []
    for backend in ("triton", "reference"):
        out = convolve_keys(inputs.k_SGD, weight, seq, backend=backend)
        results.append([out, *torch.autograd.grad(out, (inputs.k_SGD, weight), grad)])
    for field, got, want in zip(("out", "dk", "dweight"), *results, strict=True):
        assert_close(got, want, torch.float32, field)


@interpreted
def test_block_sums_equal_torch() -> None:
    from moba_train.attention.kernels import gate as gate_kernels

    case = CASES_BY_NAME["empty-documents"]
    keys, seq = case.inputs(torch.float32).k_SGD.detach(), case.sequence()
    actual = gate_kernels.block_sums(keys, seq, case.block_size)
    assert_close(actual, block_sums(keys, seq, case.block_size), torch.float64)


@interpreted
@pytest.mark.parametrize("deterministic", [False, True])
def test_routing_lists_every_pick_once(deterministic: bool) -> None:
    from moba_train.attention.kernels.routing import route

    case = CASES_BY_NAME["last-block-of-one"]
    inputs = case.inputs(torch.float32)
    picks = _picks(case, inputs)
    num_blocks = case.sequence().blocks(case.block_size).num_blocks
    lists = route(picks, case.key_heads, num_blocks, deterministic=deterministic)
    group = case.heads // case.key_heads
    for entry in range(lists.num_lists):
        start, end = (int(side[entry * lists.stride]) for side in (lists.starts, lists.ends))
        got = lists.pairs[start:end].tolist()
        key_head, block = divmod(entry, num_blocks)
        mine = picks[:, key_head * group : (key_head + 1) * group, 1:] == block
        t, h, slot = mine.nonzero(as_tuple=True)
        want = ((t * case.heads + h + key_head * group) * case.top_k + slot + 1).tolist()
        assert sorted(got) == sorted(want)


@interpreted
def test_rows_are_padded_as_the_library_reads_them() -> None:
    from moba_train.attention.kernels.gather import pad_rows

    starts, multiple = torch.tensor([0, 0, 5, 69, 69, 400], dtype=torch.int32), 64
    generator = torch.Generator().manual_seed(0)
    lse, minus_delta = torch.randn(2, 410, generator=generator)
    lse[7] = -torch.inf
    room = (410 + len(starts) * multiple) // multiple * multiple
    to_lse2, to_delta = torch.full((2, room), torch.nan)
    pad_rows(lse, minus_delta, starts, to_lse2, to_delta, multiple)
    expected = torch.full((2, room), torch.nan)
    for sequence, (start, end) in enumerate(pairwise(starts.tolist())):
        first = (start + sequence * multiple) // multiple * multiple
        padded = -(-(end - start) // multiple) * multiple
        assert expected[:, first : first + padded].isnan().all(), "sequences share no row"
        expected[0, first : first + padded], expected[1, first : first + padded] = torch.inf, 0.0
        expected[0, first : first + end - start] = lse[start:end] / math.log(2)
        expected[1, first : first + end - start] = -minus_delta[start:end]
    expected[0][expected[0] == -torch.inf] = 0.0
    torch.testing.assert_close(torch.stack([to_lse2, to_delta]), expected, equal_nan=True)


@interpreted
@pytest.mark.parametrize("sparse", [True, False], ids=["moba", "full"])
def test_flash_gradients_of_permuted_keys_are_dense(sparse: bool, flash_stand_in: None) -> None:
    """The library's have the strides of k and v; a compiled model is promised dense ones."""
    case = CASES_BY_NAME["gqa-odd-group"]
    seq, inputs = case.sequence(), case.inputs(torch.float32)
    q, *keys = (x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs[:3])
    assert not keys[0].is_contiguous()
    op = partial(moba_attention, picks=_picks(case, inputs), **case.routing) if sparse else full_attention
    out, _ = op(q, *keys, seq, backend="flash")
    assert all(grad.is_contiguous() for grad in torch.autograd.grad(out, (q, *keys), inputs.dout_THD))


@interpreted
@pytest.mark.parametrize("deterministic", [False, True])
def test_pairs_that_one_id_cannot_tell_apart_go_group_by_group(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moba_train.attention.kernels import routing

    case = CASES_BY_NAME["mha"]
    inputs = case.inputs(torch.float32)
    picks = _picks(case, inputs)
    attend = _attend(case, picks, deterministic=deterministic)
    expected = run_op(attend, inputs)
    monkeypatch.setattr(routing, "_MOST_IDS", 2 * picks.shape[0] * picks.shape[2] + 1)
    assert routing.head_groups(picks, case.key_heads) == [slice(0, 2), slice(2, 3)]
    for field, got, want in zip(Result._fields, run_op(attend, inputs), expected, strict=True):
        assert_close(got, want, torch.float32, field)
