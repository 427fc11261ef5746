"""The key convolution: by hand, every backend against the reference, and what it never reaches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu

from moba_train.attention import SequenceInfo, convolve_keys
from tests.helpers.cases import CASES, CASES_BY_NAME, Case
from tests.helpers.tolerance import assert_close, assert_gradients, assert_low_precision

WIDTHS = {torch.float64: 4, torch.float32: 3}


def weights(case: Case, width: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    shape = (case.key_heads, case.head_dim, width)
    drawn = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    return drawn.to(device, dtype).requires_grad_()


def run(op, case: Case, seq: SequenceInfo, width: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """The convolved keys and the gradients of keys and weights."""
    inputs = case.inputs(dtype, device)
    weight = weights(case, width, dtype, device)
    out = op(inputs.k_SGD, weight, seq)
    grad = inputs.dout_THD[:, : case.key_heads]
    return [out.detach(), *torch.autograd.grad(out, (inputs.k_SGD, weight), grad, materialize_grads=True)]


def test_by_hand() -> None:
    """Documents of 3 and 2 tokens, one channel, weights 1 (lag 0) and 10 (lag 1)."""
    k = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)[:, None, None]
    weight = torch.tensor([[[1.0, 10.0]]], dtype=torch.float64)
    expected = k + silu(torch.tensor([1.0, 12.0, 23.0, 4.0, 45.0], dtype=torch.float64))[:, None, None]
    for backend in ("reference", "portable"):
        assert_close(convolve_keys(k, weight, SequenceInfo([0, 3, 3, 5]), backend=backend), expected, torch.float64)


def test_one_document_equals_torch() -> None:
    case = CASES_BY_NAME["one-head"]
    k, weight = case.inputs().k_SGD, weights(case, 4, torch.float64)
    padded = torch.nn.functional.pad(k.flatten(1).T, (3, 0))
    mixed = conv1d(padded, weight.flatten(0, 1).flip(-1)[:, None], groups=case.head_dim)
    assert_close(convolve_keys(k, weight, case.sequence()), k + silu(mixed.T)[:, None], torch.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case: Case, conv_backend) -> None:
    for dtype in conv_backend.dtypes:
        arguments = (case, case.sequence(), WIDTHS[dtype], dtype, conv_backend.device)
        names = (conv_backend.name, "reference")
        actual, expected = (run(partial(convolve_keys, backend=name), *arguments) for name in names)
        for name, got, want in zip(("out", "dk", "dweight"), actual, expected, strict=True):
            assert_close(got, want, dtype, name)


@pytest.mark.parametrize("width", [1, 2, 40])
def test_any_width(width: int, conv_backend) -> None:
    """One key alone; and more keys than any document has."""
    case, dtype = CASES_BY_NAME["empty-documents"], torch.float32
    arguments = (case, case.sequence(), width, dtype, conv_backend.device)
    actual, expected = (
        run(partial(convolve_keys, backend=name), *arguments) for name in (conv_backend.name, "reference")
    )
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, want, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Sums run in fp32, also under weights in 16 bits."""
    case = CASES_BY_NAME["last-block-short"]
    low = run(convolve_keys, case, case.sequence(), 4, dtype)
    k, weight = case.inputs(dtype).k_SGD.detach(), weights(case, 4, dtype).detach()
    leaves = [k.double().requires_grad_(), weight.double().requires_grad_()]
    out = convolve_keys(*leaves, case.sequence())
    grad = case.inputs(dtype).dout_THD[:, : case.key_heads].double()
    exact = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    for got, want in zip(low, exact, strict=True):
        assert got.dtype == dtype
        assert_low_precision(got, want.to(dtype), want, "output")


def test_zero_weights_are_the_identity_and_learn(conv_backend) -> None:
    case, dtype = CASES_BY_NAME["empty-documents"], torch.float32
    k = case.inputs(dtype, conv_backend.device).k_SGD
    weight = torch.zeros(case.key_heads, case.head_dim, 4, device=conv_backend.device, requires_grad=True)
    out = convolve_keys(k, weight, case.sequence(), backend=conv_backend.name)
    assert torch.equal(out, k)
    (grad,) = torch.autograd.grad(out.square().sum(), weight)
    assert (grad != 0).all()


def test_a_neighbouring_document_never_shows(conv_backend) -> None:
    case, dtype = CASES_BY_NAME["documents-shorter-than-a-block"], torch.float32
    k, weight = case.inputs(dtype, conv_backend.device).k_SGD.detach(), weights(case, 4, dtype, conv_backend.device)
    expected = convolve_keys(k, weight, case.sequence(), backend=conv_backend.name)
    k[:5] = torch.nan
    out = convolve_keys(k, weight, case.sequence(), backend=conv_backend.name)
    assert torch.equal(out[5:], expected[5:])
    assert out[:5].isnan().all()


@pytest.mark.parametrize("chunks", [(7, 40), (1, 2, 3, 50), (39, 41, 58)])
def test_new_tokens_need_only_the_last_keys(chunks: tuple[int, ...], conv_backend) -> None:
    """The way a decoder or a chunked prefill goes: raw keys of the last width - 1 tokens, then the new ones."""
    case, width, dtype = CASES_BY_NAME["last-block-of-one"], 4, torch.float32
    k, weight = case.inputs(dtype, conv_backend.device).k_SGD, weights(case, width, dtype, conv_backend.device)
    whole = convolve_keys(k, weight, case.sequence(), backend=conv_backend.name)
    start = 0
    for stop in chunks:
        first = max(0, start - width + 1)
        seq = SequenceInfo(case.cu_seqlens, range(start, stop), range(first, stop))
        out = convolve_keys(k[first:stop], weight, seq, backend=conv_backend.name)
        assert_close(out, whole[start:stop], dtype)
        start = stop


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_gradients_equal_differences(backend: str) -> None:
    seq = SequenceInfo([0, 4, 4, 7], [2, 3, 5, 6], [0, 1, 2, 3, 4, 5, 6])
    generator = torch.Generator().manual_seed(0)
    k, weight = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((7, 2, 3), (2, 3, 3)))
    op = partial(convolve_keys, seq=seq, backend=backend)
    assert_gradients(op, [k.requires_grad_(), weight.requires_grad_()])


@pytest.mark.parametrize("held", [[4, 5], [2, 3, 5], [3, 4]])
def test_too_few_held_keys_are_refused(held: list[int]) -> None:
    seq = SequenceInfo([0, 2, 8], [5], held)
    with pytest.raises(ValueError, match="width 3 needs"):
        convolve_keys(torch.ones(len(held), 1, 2), torch.ones(1, 2, 3), seq)


@pytest.mark.parametrize(
    ("k", "weight", "message"),
    [
        (torch.ones(7, 2, 4), torch.ones(2, 4, 3), "8 held keys"),
        (torch.ones(8, 2, 4, dtype=torch.int64), torch.ones(2, 4, 3), "floating point"),
        (torch.ones(8, 2, 4), torch.ones(1, 4, 3), "2 key heads, 4, width"),
        (torch.ones(8, 2, 4), torch.ones(2, 4, 0), "2 key heads, 4, width"),
        (torch.ones(8, 2, 4), torch.ones(2, 4, 3, device="meta"), "on cpu"),
    ],
)
def test_refused(k: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convolve_keys(k, weight, SequenceInfo([0, 8]))
