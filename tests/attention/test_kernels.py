"""The kernels on a GPU in the dtypes they train in, against fp64, and their promises beyond the numbers."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from functools import partial
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from moba_train.attention import (
    SequenceInfo,
    block_means,
    convolve_keys,
    flash_library,
    flash_staging,
    full_attention,
    moba_attention,
    reference,
    select_blocks,
)
from tests.helpers.cases import CASES, Case, Inputs, run_op, zigzag_positions
from tests.helpers.ops_called import OpsCalled
from tests.helpers.tolerance import assert_low_precision, assert_same_but_for_order, assert_same_routing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Shapes that take each path of the kernels: tile widths, ragged blocks, short and long lists, one and many heads.
SHAPES = (
    Case("mha-128", (0, 1024), 4, 4, 128, 128, 3),
    Case("gqa-64", (0, 700, 700, 1017, 1020), 8, 2, 128, 64, 4),
    Case("ragged-100", (0, 700, 700, 1017, 1020), 4, 2, 64, 100, 4),
    Case("head-dim-80", (0, 900), 4, 2, 80, 48, 5),
    Case("mqa-head-dim-96", (0, 900), 4, 1, 96, 32, 12),
    Case("head-dim-256", (0, 600, 800), 4, 2, 256, 128, 3),
    Case("block-512", (0, 1500), 8, 2, 128, 512, 2),
    Case("block-2048", (0, 5000), 2, 1, 128, 2048, 2),
    Case("top-1", (0, 1000), 2, 2, 128, 128, 1),
    Case("zigzag", (0, 700, 1300), 4, 2, 128, 96, 3, q_positions=zigzag_positions(1300, 1, 5)),
    Case("decode", (0, 700, 1300), 8, 2, 128, 96, 3, q_positions=(1299,)),
    Case("first-forced", (0, 700, 1300), 4, 2, 128, 64, 4, force_first_block=True),
    Case("previous-forced", (0, 700, 1300), 4, 2, 128, 64, 4, force_previous_block=True),
    Case("picks-shared", (0, 700, 1300), 8, 2, 128, 64, 4, share_picks_in_group=True),
    Case(
        "all-options-64",
        (0, 1020),
        8,
        1,
        64,
        32,
        12,
        force_first_block=True,
        force_previous_block=True,
        share_picks_in_group=True,
    ),
)
EVERY = (*CASES, *SHAPES)


def _check(op, reference_op, case: Case, dtype: torch.dtype) -> None:
    exact, same_dtype, actual = (
        run_op(function, case.inputs(kind, "cuda"))
        for function, kind in ((reference_op, torch.float64), (reference_op, dtype), (op, dtype))
    )
    assert_low_precision(actual.out, same_dtype.out, exact.out, "output", "out")
    for field in ("dq", "dk", "dv"):
        parts = (getattr(result, field) for result in (actual, same_dtype, exact))
        assert_low_precision(*parts, "gradient", field)


def _picks(case: Case, inputs: Inputs, backend: str = "portable") -> Tensor:
    sizes = case.routing
    return select_blocks(inputs.q_THD, inputs.k_SGD, case.sequence(), **sizes, backend=backend)


def _moba(case: Case, picks: Tensor, backend: str = "triton", **options):
    sizes = case.routing
    return partial(moba_attention, seq=case.sequence(), picks=picks, **sizes, backend=backend, **options)


def _served(case: Case, backend: str) -> Case:
    """The case in the next head dim that the backend takes: FlashAttention serves multiples of 32."""
    return case if backend == "triton" else dataclasses.replace(case, head_dim=-(-case.head_dim // 32) * 32)


@pytest.fixture(params=["triton", "flash", "mixed"])
def backend(request: pytest.FixtureRequest) -> str:
    refusal = flash_library.refusal(torch.empty(0, 1, 64, dtype=torch.bfloat16, device="cuda"))
    if request.param != "triton" and refusal is not None:
        pytest.skip(refusal)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_moba_errs_no_more_than_torch(case: Case, dtype: torch.dtype, backend: str) -> None:
    case = _served(case, backend)
    picks = _picks(case, case.inputs(dtype, "cuda"))
    mask = reference.moba_mask(case.sequence(), picks, case.block_size)
    expected = partial(reference.masked_attention, mask_THS=mask, scale=case.head_dim**-0.5)
    _check(_moba(case, picks, backend), expected, case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_full_errs_no_more_than_torch(case: Case, dtype: torch.dtype, backend: str) -> None:
    if backend == "mixed":
        pytest.skip("is of MoBA alone")
    case = _served(case, backend)
    seq = case.sequence()
    mask = reference.full_mask(seq).cuda()[:, None].expand(-1, case.heads, -1)
    expected = partial(reference.masked_attention, mask_THS=mask, scale=case.head_dim**-0.5)
    _check(partial(full_attention, seq=seq, backend=backend), expected, case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_gate_equals_definition_outside_rounding(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, "cuda")
    picks, expected = (_picks(case, inputs, backend) for backend in ("triton", "portable"))
    means = block_means(inputs.k_SGD, case.sequence(), case.block_size)
    assert_same_routing(picks, expected, inputs.q_THD, means, case.share_picks_in_group)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gqa-64", "head-dim-80", "zigzag"])
def test_key_convolution_errs_no_more_than_torch(name: str, dtype: torch.dtype) -> None:
    case = next(case for case in SHAPES if case.name == name)
    results = []
    for backend, kind in (("triton", dtype), ("portable", dtype), ("portable", torch.float64)):
        inputs = case.inputs(dtype, "cuda")
        weight = torch.randn(case.key_heads, case.head_dim, 4, generator=torch.Generator().manual_seed(0))
        leaves = [x.detach().to("cuda", dtype).to(kind).requires_grad_() for x in (inputs.k_SGD, weight)]
        out = convolve_keys(*leaves, case.sequence(), backend=backend)
        grad = inputs.dout_THD[:, : case.key_heads].to(kind)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for kind, parts in zip(("output", "gradient", "gradient"), zip(*results, strict=True), strict=True):
        assert_low_precision(*parts, kind)


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize("name", ["gqa-64", "mha-128", "zigzag"])
def test_many_pieces_err_no_more_than_torch(
    name: str, deterministic: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`flash` stages a few heads, or rows of one, at a time; here far fewer, so that pieces and groups follow."""
    if backend == "triton":
        pytest.skip("stages nothing in backward")
    monkeypatch.setattr(flash_staging, "_STAGING", 0.0)
    monkeypatch.setattr(flash_staging, "_STAGING_FLOOR", 2**20)
    case = next(case for case in SHAPES if case.name == name)
    inputs = case.inputs(torch.bfloat16, "cuda")
    picks = _picks(case, inputs)
    bounds = torch.empty(case.sequence().blocks(case.block_size).num_blocks + 1)
    groups = flash_staging.groups_of(inputs.q_THD, picks, inputs.k_SGD, bounds, backward=True)
    assert len(groups) > 1
    assert len(groups[0].pieces) > 1
    mask = reference.moba_mask(case.sequence(), picks, case.block_size)
    expected = partial(reference.masked_attention, mask_THS=mask, scale=case.head_dim**-0.5)
    _check(_moba(case, picks, backend, deterministic=deterministic), expected, case, torch.bfloat16)


@pytest.mark.parametrize("sparse", [True, False], ids=["moba", "full"])
@pytest.mark.parametrize("name", ["gqa-64", "block-2048", "zigzag"])
def test_deterministic_gradients_do_not_move(name: str, sparse: bool, backend: str) -> None:
    case = next(case for case in SHAPES if case.name == name)
    inputs = case.inputs(torch.bfloat16, "cuda")
    if sparse:
        op = _moba(case, _picks(case, inputs), backend, deterministic=True)
    elif backend == "mixed":
        pytest.skip("is of MoBA alone")
    else:
        op = partial(full_attention, seq=case.sequence(), backend=backend, deterministic=True)
    first = run_op(op, inputs)
    for _ in range(5):
        assert all(torch.equal(got, want) for got, want in zip(run_op(op, inputs), first, strict=True))


def test_deterministic_as_torch_says() -> None:
    case = SHAPES[1]
    inputs = case.inputs(torch.bfloat16, "cuda")
    picks = _picks(case, inputs)
    expected = run_op(_moba(case, picks, deterministic=True), inputs)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        actual = run_op(_moba(case, picks), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(got, want) for got, want in zip(actual, expected, strict=True))


def test_repetitions_stay_within_rounding(backend: str) -> None:
    case = SHAPES[1]
    inputs = case.inputs(torch.bfloat16, "cuda")
    op = _moba(case, _picks(case, inputs), backend)
    first = run_op(op, inputs)
    for _ in range(100):
        again = run_op(op, inputs)
        assert torch.equal(again.out, first.out)
        assert torch.equal(again.lse, first.lse)
        # dq is summed by atomics in any order, in fp32, and rounded to bf16 once.
        for name in ("dq", "dk", "dv"):
            assert_same_but_for_order(getattr(again, name), getattr(first, name))


def test_forward_and_backward_record_into_a_cuda_graph(backend: str) -> None:
    case = SHAPES[0]
    inputs = case.inputs(torch.bfloat16, "cuda")
    seq, sizes = case.sequence(), case.routing

    def step() -> tuple[Tensor, ...]:
        # Leaves of its own: those of another step belong to that step's stream, which a capture may not wait for.
        leaves = [x.detach().requires_grad_() for x in (inputs.q_THD, inputs.k_SGD, inputs.v_SGD)]
        out, lse = moba_attention(*leaves, seq, **sizes, backend=backend)
        return out.detach(), *torch.autograd.grad((out, lse), leaves, (inputs.dout_THD, inputs.dlse_TH))

    expected = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(recorded[0], expected[0])
    for got, want in zip(recorded[1:], expected[1:], strict=True):
        assert_same_but_for_order(got, want)


@pytest.mark.parametrize("permuted", [False, True], ids=["dense", "permuted"])
def test_compiled_model_gives_the_same(backend: str, permuted: bool) -> None:
    torch._dynamo.reset()
    case = SHAPES[0]
    inputs = case.inputs(torch.bfloat16, "cuda")
    seq, sizes = case.sequence(), case.routing

    def layer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if permuted:
            q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
        out, lse = moba_attention(q * 2, k, v, seq, **sizes, backend=backend)
        return out + 1, lse

    expected = run_op(layer, inputs)  # which also makes the batch's tables, on the host
    actual = run_op(torch.compile(layer, fullgraph=True), inputs)
    for got, want in zip(actual, expected, strict=True):
        assert_same_but_for_order(got, want)


@pytest.mark.parametrize("name", ["gqa-64", "zigzag"])
def test_ops_keep_what_they_promise_to_compilers(name: str, backend: str) -> None:
    """Schemas and fake kernels of every op that one step of gate, MoBA, full attention and key convolution calls."""
    case = next(case for case in SHAPES if case.name == name)
    seq, inputs = case.sequence(), case.inputs(torch.bfloat16, "cuda")
    weight = torch.randn(case.key_heads, case.head_dim, 4, device="cuda", requires_grad=True)

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if case.q_positions is None:
            k = convolve_keys(k, weight, seq)
        out, lse = moba_attention(q, k, v, seq, **case.routing, backend=backend)
        dense, dense_lse = full_attention(q, k, v, seq, backend="triton" if backend == "mixed" else backend)
        return out + dense, lse + dense_lse

    with OpsCalled() as called:
        run_op(step, inputs)
    passes = {
        "triton": ("moba_forward", "moba_backward"),
        "flash": ("flash_forward", "flash_backward"),
        "mixed": ("moba_forward", "moba_backward", "flash_backward"),  # full attention by triton
    }
    convolution = ("convolve_keys", "convolve_keys_backward") if case.q_positions is None else ()
    assert called.names == {"block_sums", "select_blocks", *passes[backend], *convolution}
    called.check()


def test_more_elements_than_32_bits_count() -> None:
    # 2^31 elements end inside q; the last document alone must give the same answer and gradients.
    lengths, heads, key_heads, head_dim, block_size = [260_000, 3_000], 64, 1, 128, 512
    cu_seqlens = [0, *accumulate(lengths)]
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.empty(cu_seqlens[-1], count, head_dim, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
        for count in (heads, key_heads, key_heads, heads)
    )
    assert q.numel() > 2**31

    def run(seq: SequenceInfo, rows: slice) -> list[Tensor]:
        leaves = [x[rows].detach().requires_grad_() for x in (q, k, v)]
        out, lse = moba_attention(*leaves, seq, block_size=block_size, top_k=3)
        grads = torch.autograd.grad(out, leaves, dout[rows])
        return [x.detach()[-lengths[1] :].clone() for x in (out, lse, *grads)]

    tail = slice(lengths[0], cu_seqlens[-1])
    expected = run(SequenceInfo([0, lengths[1]]), tail)
    actual = run(SequenceInfo(cu_seqlens), slice(0, cu_seqlens[-1]))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    for got, want in zip(actual[2:], expected[2:], strict=True):
        assert_same_but_for_order(got, want)


_SANITIZED = """
import torch
from moba_train.attention import SequenceInfo, moba_attention
torch.manual_seed(0)
heads = (4, 2, 2)
q, k, v = (torch.randn(330, h, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for h in heads)
out, lse = moba_attention(q, k, v, SequenceInfo([0, 200, 200, 330]), block_size=48, top_k=3, backend="triton")
(out.float().sum() + lse.sum()).backward()
# What `flash` and `mixed` do around the library's kernels.
from moba_train.attention import select_blocks
from moba_train.attention.flash import _queries
from moba_train.attention.kernels.gather import gather, merge_parts, pad_rows, sum_parts
from moba_train.attention.kernels.routing import route
seq = SequenceInfo([0, 200, 200, 330])
picks = select_blocks(q.detach(), k.detach(), seq, block_size=48, top_k=3)
lists = route(picks, 2, seq.blocks(48).num_blocks, places=True)
out, lse, delta = out.detach(), lse.detach(), torch.randn_like(lse)
q_PD, dout_PD, lse_P, minus_delta_P = gather(lists, 3, q.detach(), out, lse, delta)
starts = _queries(lists)
room = (q_PD.shape[0] + starts.shape[0] * 64) // 64 * 64
pad_rows(lse_P, minus_delta_P, starts, torch.empty(room, device="cuda"), torch.empty(room, device="cuda"), 64)
merge_parts(out, lse, q_PD, lse_P, lists)
sum_parts(torch.zeros_like(out), dout_PD, lists)
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged blocks, an empty document, grouped heads; every tensor an allocation of its own, which is guarded."""
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", _SANITIZED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
