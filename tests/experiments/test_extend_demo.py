"""The demonstration from beginning to end, with the smallest of everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)
def test_a_tiny_llama_goes_in_is_stretched_and_comes_out(tmp_path: Path) -> None:
    command = [sys.executable, "experiments/extend_demo/run.py", "--tiny", "--steps", "2", "--megabytes", "0.1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "writes the same as transformers with MoBA" in found.stdout
    config = json.loads((tmp_path / "tiny-moba" / "config.json").read_text())
    assert config["max_position_embeddings"] == 2048
    assert [layer["kind"] for layer in config["moba"]["layers"]] == ["moba"] * 3 + ["full"]
