"""The project's custom ops that a piece of code calls, and what they promise to compilers."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["OpsCalled"]


class OpsCalled(TorchDispatchMode):
    """`calls`: (op, arguments) of every call of an op of moba_train within."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moba_train":
            assert not kwargs
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> set[str]:
        return {func._schema.name.removeprefix("moba_train::") for func, _ in self.calls}

    def check(self) -> None:
        """Schemas (nothing is changed, nothing returned that came in) and fake kernels against the real ones."""
        for func, args in self.calls:
            torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))
