"""Custom ops whose functions are called themselves in eager mode.

There dispatching an op takes the host longer than launching a kernel, and short contexts wait for it. The op is called
under `torch.compile`, where a dispatch mode (fake tensors, a counter of FLOPs) looks on, and where gradients are
recorded: it refuses to be differentiated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["custom_op"]

_Function = Callable[..., Any]


def custom_op(name: str, *, fake: _Function) -> Callable[[_Function], _Function]:
    """Register a function of tensors and numbers, which changes none of them, as op `moba_train::name`.

    Args:
        fake: empty tensors of the results' shapes and dtypes, from the same arguments.
    """

    def register(function: _Function) -> _Function:
        op = torch.library.custom_op(f"moba_train::{name}", function, mutates_args=())
        op.register_fake(fake)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_in_torch_dispatch_mode():
                return op(*args)
            return function(*args)

        return call

    return register
