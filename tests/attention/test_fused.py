"""Which of PyTorch's kernels serves which queries of full attention, and cuDNN's against fp64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from moba_train.attention import SequenceInfo, full_attention, fused, reference
from tests.helpers.cases import Case, Result, run_masked, run_op, to_dtype, zigzag_positions
from tests.helpers.tolerance import assert_low_precision

LONG = fused._WORTH_PLANS
ONE = SequenceInfo([0, LONG])


@pytest.mark.parametrize(
    "seq, head_dim, dtype, capability, forward",
    [
        (ONE, 128, torch.bfloat16, (9, 0), fused._cudnn),
        (ONE, 72, torch.float16, (10, 0), fused._cudnn),
        (SequenceInfo([0, 2 * LONG], zigzag_positions(2 * LONG, 0, 2)), 64, torch.bfloat16, (9, 0), fused._cudnn),
        (ONE, 128, torch.bfloat16, (8, 0), fused._flash),
        (ONE, 100, torch.bfloat16, (9, 0), fused._flash),
        (ONE, 256, torch.bfloat16, (9, 0), fused._flash),
        (SequenceInfo([0, 5, LONG]), 128, torch.bfloat16, (9, 0), fused._flash),
        (SequenceInfo([0, 2 * LONG], range(LONG - 1)), 128, torch.bfloat16, (9, 0), fused._flash),
        (SequenceInfo([0, 2 * LONG], range(0, 2 * LONG, 2)), 128, torch.bfloat16, (9, 0), fused._flash),
        (SequenceInfo([0, 2 * LONG], [*range(LONG), 2 * LONG - 1]), 128, torch.bfloat16, (9, 0), fused._flash),
        (SequenceInfo([0, 2 * LONG], range(1, 2 * LONG)), 128, torch.bfloat16, (9, 0), fused._flash),
        (ONE, 128, torch.float32, (9, 0), fused._efficient),
    ],
)
def test_cudnn_gets_long_batches_of_one_document_in_long_runs(
    seq: SequenceInfo,
    head_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    forward: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q_THD = torch.empty(seq.num_queries, 2, head_dim, dtype=dtype, device="meta")
    assert fused.choose(q_THD, seq).forward is forward
    assert ("cuDNN" in fused.describe(q_THD)) == (
        capability[0] >= 9 and dtype != torch.float32 and head_dim in (64, 72, 128)
    )
    assert fused.choose(torch.empty_like(q_THD, device="cpu"), seq).forward is fused._cpu
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert fused.choose(q_THD, seq).forward is not fused._cudnn


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("through_lse", [False, True], ids=["out", "out-and-lse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("one-document", (0, LONG + 4), heads=6, key_heads=2, head_dim=64),
        Case("multi-query", (0, LONG), heads=4, key_heads=1, head_dim=128),
        Case("zigzag", (0, 2 * LONG), head_dim=64, q_positions=zigzag_positions(2 * LONG, 0, 2)),
    ],
    ids=str,
)
def test_long_document_in_low_precision(case: Case, dtype: torch.dtype, through_lse: bool) -> None:
    seq, inputs = case.sequence(), case.inputs(dtype, "cuda")
    if torch.cuda.get_device_capability() >= (9, 0):
        assert fused.choose(inputs.q_THD, seq).forward is fused._cudnn
    if not through_lse:
        inputs = inputs._replace(dlse_TH=torch.zeros_like(inputs.dlse_TH))
    mask = reference.full_mask(seq).to("cuda")[:, None].expand(-1, case.heads, -1)

    def out_alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = full_attention(q, k, v, seq, backend="sdpa")
        return out, lse.detach().requires_grad_()

    op = partial(full_attention, seq=seq, backend="sdpa") if through_lse else out_alone
    actual = run_op(op, inputs)
    scale = case.head_dim**-0.5
    same_dtype, exact = run_masked(inputs, mask, scale), run_masked(to_dtype(inputs, torch.float64), mask, scale)
    for field, got, baseline, truth in zip(Result._fields, actual, same_dtype, exact, strict=True):
        assert_low_precision(got, baseline, truth, "gradient" if field.startswith("d") else "output", field)
