"""Imported once by the server that test ranks are forked from: what most of them need. Nothing here starts a thread."""

from __future__ import annotations

import gc
import importlib
import sys

# megatron-core imports it where it can and uses it for nothing here: a second a process.
sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]

for _name in (
    "moba_train.eval.evaluate",
    "moba_train.train.convert",
    "moba_train.train.step",
    "tests.helpers.hf",
    "tests.helpers.training",
):
    importlib.import_module(_name)

# What is here now lives as long as the server: no rank need look through it, and so copy it, when it collects garbage.
gc.collect()
gc.freeze()
