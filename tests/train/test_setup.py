"""Set-up: what a machine with GPUs is refused, and the run folder; refusals that any machine gives: tests/launch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moba_train.config.schema import ConfigError, RunConfig
from moba_train.train import setup


@pytest.mark.parametrize(
    "attention, config, name, said",
    [
        ({}, {"precision": "fp32"}, "flash", "computes in bf16"),
        ({}, {"head_dim": 80}, "mixed", "multiples of 32"),
        ({}, {"head_dim": 512}, "triton", "up to 256"),
        ({}, {"head_dim": 512}, "sdpa", "up to 256"),
        ({}, {"head_dim": 512}, "auto", None),
        ({"deterministic": True}, {}, "portable", "deterministic"),
        ({"deterministic": True}, {}, "triton", None),
        ({"deterministic": True}, {}, "auto", None),
        ({"deterministic": True}, {"head_dim": 512}, "auto", "deterministic"),
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


def test_runs_begun_in_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(setup.time, "strftime", lambda _: "20261231-235959")
    folders = [setup._new_folder("tiny") for _ in range(3)]
    assert folders == [f"runs/tiny-20261231-235959{end}" for end in ("", "-2", "-3")]
    assert all(Path(folder).is_dir() for folder in folders)


def test_a_folder_that_cannot_be_made_is_left_to_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").touch()  # a file
    assert not Path(setup._new_folder("tiny")).exists()
