"""The longest files first; and uninitialised memory that is poison for calls from moba_train.attention."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

_LONGEST = (
    "integration/test_parallel_training.py",
    "integration/test_parallel_options.py",
    "attention/test_kernels_interpreter.py",
    "launch/",
    "integration/",
)
_TESTS = Path(__file__).parent
_POISONED = ("empty", "empty_like", "empty_strided")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever worker came last to a long file would keep the others waiting."""

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(_TESTS).as_posix()
        return next((i for i, start in enumerate(_LONGEST) if name.startswith(start)), len(_LONGEST))

    items.sort(key=place)


@pytest.fixture
def as_if_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that only ask whether it is installed find it."""
    find = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return name if name == "transformer_engine" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)


def _poisoning(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = factory(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _poison(tensor) if caller.startswith("moba_train.attention") else tensor

    return create


@pytest.fixture(autouse=True, scope="session")
def poison_uninitialised_memory() -> Iterator[None]:
    """An unwritten output cannot pass."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _POISONED:
            patch.setattr(torch, name, _poisoning(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, _poisoning(getattr(torch.Tensor, name)))
        yield
