"""torch.compile around the ops: whole graphs, and what the ops promise to it.

The kernels run in Triton's interpreter, in a process of their own (helpers/interpreter.py); on a GPU: test_kernels.py.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

from moba_train.attention import SequenceInfo, convolve_keys, full_attention, moba_attention, select_blocks
from tests.helpers.cases import CASES_BY_NAME, Case, Result, run_op
from tests.helpers.interpreter import interpreted, not_interpreted, run_interpreted
from tests.helpers.ops_called import OpsCalled
from tests.helpers.tolerance import assert_close


@not_interpreted
def test_in_interpreter() -> None:
    run_interpreted(__file__)


# Documents longer than top_k blocks, so that MoBA does not fall back to full attention; another number of them each.
CASE = Case("compiled", (0, 40), block_size=8, top_k=2)
BATCHES = ((0, 40), (0, 19, 40), (0, 17, 38, 40), (0, 18, 40), (0, 2, 5, 9, 40), (0, 1, 20, 22, 39, 40), (0, 20, 40))
OPS = {
    ("moba", "triton"): {"select_blocks", "moba_forward", "moba_backward"},
    ("moba", "flash"): {"select_blocks", "flash_forward", "flash_backward"},
    ("moba", "mixed"): {"select_blocks", "moba_forward", "flash_backward"},
    ("full", "triton"): {"moba_forward", "moba_backward"},
    ("full", "flash"): {"flash_forward", "flash_backward"},
}


def _layer(op: str, backend: str):
    attend = partial(full_attention, backend=backend)
    if op == "moba":
        attend = partial(moba_attention, **CASE.routing, backend=backend)

    def layer(q, k, v, seq):
        out, lse = attend(q * 2, k, v, seq)
        return out + 1, lse

    return layer


@interpreted
@pytest.mark.parametrize("op, backend", OPS)
def test_batches_go_through_one_whole_graph(op: str, backend: str, flash_stand_in: None) -> None:
    torch._dynamo.reset()
    layer, inputs = _layer(op, backend), CASE.inputs(torch.float32)
    compiler = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    for lengths in BATCHES:
        seq = SequenceInfo(lengths)
        with OpsCalled() as called:
            expected = run_op(partial(layer, seq=seq), inputs)  # which also makes the batch's tables, on the host
        assert called.names == OPS[op, backend]
        for field, got, want in zip(Result._fields, run_op(partial(compiled, seq=seq), inputs), expected, strict=True):
            assert_close(got, want, torch.float32, field)
    assert compiler.frame_count <= 4 < len(BATCHES), "compiled anew batch after batch: sizes have not become symbols"


@not_interpreted
def test_sdpa_goes_through_a_whole_graph() -> None:
    torch._dynamo.reset()
    layer, inputs = _layer("full", "sdpa"), CASE.inputs(torch.float32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for lengths in BATCHES[:3]:
        seq = SequenceInfo(lengths)
        expected = run_op(partial(layer, seq=seq), inputs)
        for field, got, want in zip(Result._fields, run_op(partial(compiled, seq=seq), inputs), expected, strict=True):
            assert_close(got, want, torch.float32, field)


@pytest.mark.parametrize(
    "op, backend",
    [pytest.param("moba", "triton", marks=interpreted), pytest.param("full", "sdpa", marks=not_interpreted)],
)
def test_a_new_batch_in_a_compiled_region_breaks_the_graph_and_says_why(op: str, backend: str) -> None:
    torch._dynamo.reset()
    layer, inputs = _layer(op, backend), CASE.inputs(torch.float32)
    layer(*inputs[:3], CASE.sequence())  # imports the backend
    with pytest.raises(Unsupported, match="made on the host at its first use"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs[:3], CASE.sequence())
    actual, expected = (
        run_op(partial(function, seq=CASE.sequence()), inputs)
        for function in (torch.compile(layer, backend="aot_eager"), layer)
    )
    for field, got, want in zip(Result._fields, actual, expected, strict=True):
        assert_close(got, want, torch.float32, field)


@interpreted
def test_ops_keep_what_they_promise_to_compilers(flash_stand_in: None) -> None:
    case = CASES_BY_NAME["gqa-odd-group"]
    seq, inputs = case.sequence(), case.inputs(torch.float32)
    weight = torch.randn(case.key_heads, case.head_dim, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def step(q, k, v):
        k = convolve_keys(k, weight, seq, backend="triton")
        picks = select_blocks(q, k, seq, **case.routing, backend="triton")
        out, lse = zip(
            *(moba_attention(q, k, v, seq, **case.routing, picks=picks, backend=b) for b in ("triton", "flash")),
            strict=True,
        )
        return sum(out), sum(lse)

    with OpsCalled() as called:
        run_op(step, inputs)
    assert called.names == {
        "convolve_keys",
        "convolve_keys_backward",
        "select_blocks",
        "moba_forward",
        "moba_backward",
        "flash_forward",
        "flash_backward",
    }
    called.check()
