"""The round trip from beginning to end, with the smallest of everything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.training import corpus

ROOT = Path(__file__).resolve().parents[2]


def go(out: Path, data: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "experiments/roundtrip_1b/run.py", "--quick", "--steps", "2", "--out", str(out)]
    smaller = ["--data", str(data), "train.sequence_length=256", "metrics.gate_every=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *smaller, *more], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.timeout(600)
def test_in_trained_out_and_in_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    data = corpus(tmp_path / "data")
    out = tmp_path / "out"
    found = go(out, data)
    assert found.returncode == 0, found.stdout + found.stderr
    page = (out / "results.md").read_text()
    assert "| imported and exported: equal | 38 tensors in 2 shards, bit by bit |" in page
    assert "| trained, exported, imported: equal | 26 core tensors, bit by bit |" in page
    assert "| steps | 2 |" in page
    assert "weights differ from the source's | 0 of" not in page
    refused = go(out, data, "optim.learning_rate=1e-5")
    assert refused.returncode != 0
    assert "was started with other settings (optim.learning_rate=1e-5)" in refused.stderr
