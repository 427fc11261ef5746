"""Functions of modules that are imported when first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["load"]

_LOADED: dict[tuple[str, str], Callable[..., Any]] = {}


def load(module: str, name: str) -> Callable[..., Any]:
    """`module.name`; torch.compile sees through it once it has been loaded."""
    if (module, name) not in _LOADED:
        _import(module, name)
    return _LOADED[module, name]


@torch.compiler.disable(reason="an import, on first use")
def _import(module: str, name: str) -> None:
    _LOADED[module, name] = getattr(importlib.import_module(module), name)
