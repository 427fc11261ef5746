"""What a machine with GPUs is refused before any process group: tests of what needs none are in tests/launch."""

from __future__ import annotations

import dataclasses

import pytest

from moba_train.config.schema import ConfigError, RunConfig
from moba_train.train import setup


@pytest.mark.parametrize(
    "attention, config, name, said",
    [
        ({}, {"precision": "fp32"}, "flash", "computes in bf16"),
        ({}, {"head_dim": 80}, "mixed", "multiples of 32"),
        ({"deterministic": True}, {}, "portable", "deterministic"),
        ({"deterministic": True}, {}, "triton", None),
        ({"deterministic": True}, {}, "auto", None),
        ({}, {}, "portable", None),
    ],
)
def test_backends_on_a_gpu(attention: dict, config: dict, name: str, said: str | None) -> None:
    run = RunConfig(precision=config.get("precision", "bf16"))
    run = dataclasses.replace(
        run,
        attention=dataclasses.replace(run.attention, **attention),
        model=dataclasses.replace(run.model, head_dim=config.get("head_dim", 64)),
    )
    if said is None:
        setup._check_backend(run, "attention.backend", name, on_gpu=True)
        return
    with pytest.raises(ConfigError, match=said):
        setup._check_backend(run, "attention.backend", name, on_gpu=True)
