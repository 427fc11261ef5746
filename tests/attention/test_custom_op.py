"""An op is its function in eager mode, and an op wherever somebody has to see it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moba_train.attention.custom_op import custom_op
from tests.helpers.ops_called import OpsCalled


def _fake(x: Tensor, _factor: int) -> Tensor:
    return torch.empty_like(x)


@custom_op("test_scaled", fake=_fake)
def scaled(x: Tensor, factor: int) -> Tensor:
    return torch.from_numpy(x.numpy() * factor)  # numpy: cannot be traced


def test_the_function_is_called_itself_in_eager_mode() -> None:
    with torch.no_grad():
        assert torch.equal(scaled(torch.ones(3), 2), torch.full((3,), 2.0))


def test_a_dispatch_mode_sees_the_op() -> None:
    x = torch.ones(3)
    with torch.no_grad(), OpsCalled() as called:
        scaled(x, 2)
    assert [func._schema.name for func, _ in called.calls] == ["moba_train::test_scaled"]


def test_compile_keeps_the_op_whole() -> None:
    compiled = torch.compile(lambda x: scaled(x, 3) + 1, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 4.0))


def test_gradients_through_it_are_refused_not_lost() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        scaled(x, 2).sum().backward()
