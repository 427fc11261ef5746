"""The one place that says how close is close enough. Never loosened for a machine or a backend.

fp64 is held to 1e-10 and fp32 to 1e-5, relative to the largest expected value (at least 1: inputs are of that size).
16-bit types are held to the error that torch makes in the same type against fp64: outputs at most twice, gradients at
most three times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "BF16_LAYOUT_LOSS_RTOL",
    "BF16_LAYOUT_NORM_RTOL",
    "BF16_LOSS_RTOL",
    "FP8_LOSS_RTOL",
    "GRAD_NORM_RTOL",
    "INDEPENDENCE_RTOL",
    "LOSS_RTOL",
    "TOLERANCE",
    "assert_close",
    "assert_gradients",
    "assert_low_precision",
    "assert_same_but_for_order",
    "assert_same_routing",
]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LOSS_RTOL, GRAD_NORM_RTOL = 1e-5, 1e-4  # of a training curve in fp32 in another parallel layout
BF16_LAYOUT_LOSS_RTOL, BF16_LAYOUT_NORM_RTOL = 1e-3, 1e-2  # the same in bf16, of a model large enough to average
BF16_LOSS_RTOL, FP8_LOSS_RTOL = 5e-3, 3e-2  # of a few steps by other layers, or by products in fp8, against bf16
INDEPENDENCE_RTOL = 1e-6  # of one step's loss and gradient (as a vector) in fp32, packed or split otherwise
# Of two bf16 results whose fp32 sums were added in other orders: an element may round to its neighbour at each of two
# roundings, 2^-8 of its size apart, and cancelled sums keep the error of their larger terms.
_BF16_ORDER = 2**-6
_FACTOR = {"output": 2.0, "gradient": 3.0}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str = "tensor") -> None:
    """Assert equal shape, dtype and infinities, no NaN, and every element within the tolerance of `dtype`."""
    finite = expected.detach()[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    atol = TOLERANCE[dtype] * max(1.0, largest)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=atol, msg=lambda text: f"{name}: {text}")


def assert_low_precision(
    actual: Tensor, same_dtype: Tensor, exact: Tensor, kind: Literal["output", "gradient"], name: str = "tensor"
) -> None:
    """Assert that `actual` errs from fp64 `exact` at most twice (gradients: thrice) as much as torch in its own dtype.

    The fp32 tolerance is added, as torch's error is 0 where there is nothing to round.
    """
    assert actual.isfinite().all(), f"{name}: not finite"
    if not exact.numel():
        return
    error, baseline = (float((tensor.double() - exact).abs().max()) for tensor in (actual, same_dtype))
    bound = _FACTOR[kind] * baseline + TOLERANCE[torch.float32]
    assert error <= bound, f"{name}: error {error:.3e} exceeds {bound:.3e} ({_FACTOR[kind]} x torch's {baseline:.3e})"


def assert_gradients(function: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
    """Assert that the gradients of `function` at fp64 `inputs` agree with central differences (error ~ step**2)."""
    step = 1e-5
    assert torch.autograd.gradcheck(function, tuple(inputs), eps=step, atol=100 * step**2, rtol=100 * step**2)


def assert_same_but_for_order(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Two bf16 results (or fp32 beside them) of the same sums, added in any order."""
    torch.testing.assert_close(actual, expected, rtol=_BF16_ORDER, atol=_BF16_ORDER)


def assert_same_routing(picks: Tensor, expected: Tensor, q_THD: Tensor, means_NGD: Tensor, shared: bool) -> None:
    """Equal picks, but where two blocks' exact scores are closer than fp32 can tell."""
    assert picks.dtype == torch.int32
    assert picks.shape == expected.shape
    group = q_THD.shape[1] // means_NGD.shape[1]
    means_NHD = means_NGD.double().repeat_interleave(group, 1)
    scores_THN = torch.einsum("thd,nhd->thn", q_THD.detach().double(), means_NHD)
    if shared:
        scores_THN = scores_THN.unflatten(1, (-1, group)).sum(2).repeat_interleave(group, 1)
    bound = TOLERANCE[torch.float32] * float(scores_THN.abs().max()) if scores_THN.numel() else 0.0
    t, h, rank = (picks != expected).nonzero(as_tuple=True)
    assert ((picks >= 0) == (expected >= 0)).all()
    got, want = (scores_THN[t, h, ids[t, h, rank].long()] for ids in (picks, expected))
    assert ((got - want).abs() <= bound).all()
    ordered = picks.sort(-1).values
    assert ((ordered.diff(dim=-1) > 0) | (ordered[..., 1:] < 0)).all(), "a block is picked twice"
