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
from tests.helpers.cases import CASES_BY_NAME, Result, run_op
from tests.helpers.interpreter import interpreted, needs_no_gpu, run_interpreted
from tests.helpers.ops_called import OpsCalled
from tests.helpers.tolerance import assert_close


@needs_no_gpu
def test_in_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.parametrize(
    "op, backend",
    [
        *(pytest.param("moba", backend, marks=interpreted) for backend in ("triton", "flash", "mixed")),
        *(pytest.param("full", backend, marks=interpreted) for backend in ("triton", "flash")),
        ("full", "sdpa"),
    ],
)
def test_batches_go_through_one_whole_graph(op: str, backend: str, flash_stand_in: None) -> None:
    case = CASES_BY_NAME["empty-documents"]
    inputs = case.inputs(torch.float32)
    attend = partial(full_attention, backend=backend)
    if op == "moba":
        attend = partial(moba_attention, **case.routing, backend=backend)

    def layer(q, k, v, seq):
        out, lse = attend(q * 2, k, v, seq)
        return out + 1, lse

    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    for lengths in ((0, 7, 29), (0, 9, 29), (0, 5, 29), (0, 3, 29), (0, 12, 29)):
        seq = SequenceInfo(lengths)
        expected = run_op(partial(layer, seq=seq), inputs)  # which also makes the batch's tables, on the host
        for field, got, want in zip(Result._fields, run_op(partial(compiled, seq=seq), inputs), expected, strict=True):
            assert_close(got, want, torch.float32, field)
    assert compiler.frame_count <= 3, "batch after batch is compiled anew: its sizes have not become symbols"


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


@interpreted
def test_a_new_batch_in_a_compiled_region_breaks_the_graph_and_says_why() -> None:
    case = CASES_BY_NAME["empty-documents"]
    inputs = case.inputs(torch.float32)
    moba_attention(*inputs[:3], case.sequence(), **case.routing, backend="triton")  # imports the backend

    def layer(q, k, v, seq):
        return moba_attention(q, k, v, seq, **case.routing, backend="triton")

    with pytest.raises(Unsupported, match="tables of a batch are made on the host"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs[:3], case.sequence())
    actual, expected = (
        run_op(partial(function, seq=case.sequence()), inputs)
        for function in (torch.compile(layer, backend="aot_eager"), layer)
    )
    for field, got, want in zip(Result._fields, actual, expected, strict=True):
        assert_close(got, want, torch.float32, field)
