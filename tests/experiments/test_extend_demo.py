"""The demonstration from beginning to end, with the smallest of everything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments.extend_demo import run as demo
from tests.helpers.spawn import run_script


@pytest.mark.timeout(600)
def test_a_tiny_llama_goes_in_is_stretched_and_comes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.subprocess, "run", run_script)
    smallest = ["--tiny", "--steps", "2", "--megabytes", "0.1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["experiments/extend_demo/run.py", *smallest])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = demo.main()
    said = capfd.readouterr()
    assert code == 0, said.out + said.err
    assert "writes the same as transformers with MoBA" in said.out
    config = json.loads((tmp_path / "tiny-moba" / "config.json").read_text())
    assert config["max_position_embeddings"] == 2048
    assert [layer["kind"] for layer in config["moba"]["layers"]] == ["moba"] * 3 + ["full"]
