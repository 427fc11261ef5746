"""What is made on first use and kept: tables of a batch, imported functions, answers about the machine.

torch.compile sees a lookup. What is not there yet is made outside its graphs: the graph breaks once for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

__all__ = ["kept", "load"]

_Key = TypeVar("_Key", bound=Hashable)
_Made = TypeVar("_Made")
_LOADED: dict[tuple[str, str], Callable[..., Any]] = {}


def kept(made: dict[_Key, Any], key: _Key, make: Callable[[], _Made]) -> _Made:
    """made[key], by `make` if it is not there."""
    if key not in made:
        _put(made, key, make)
    found: _Made = made[key]
    return found


def load(module: str, name: str) -> Callable[..., Any]:
    """`module.name`; the module is imported at the first call."""
    return kept(_LOADED, (module, name), lambda: getattr(importlib.import_module(module), name))


@torch.compiler.disable(
    reason="made on the host at its first use, such as the tables of a batch: run the op once on the batch before "
    "(moba_train/attention/README.md, torch.compile)"
)
def _put(made: dict[Any, Any], key: Hashable, make: Callable[[], Any]) -> None:
    made[key] = make()
